"""The masks of the package mobile_sam beside ours: the same weights, photographs, settings and device.

    python benchmarks/parity.py --images FOLDER [--checkpoint x.pt] [--device cuda] [--precision both]

Prints one table. In float32 mask i is compared with mask i; in bfloat16, where thresholds fall differently,
masks are matched one to one by IoU, and the mean IoU of the matched and the share of the unmatched are told.
Without a checkpoint the weights are random, their predicted IoUs and mask logits spread about the thresholds.

The exit code is 1 if in float32 an embedding differs by more than 1e-4, or masks are of another number or order,
or one has an IoU below 0.999 or a score that differs by more than 1e-4.
"""

import argparse
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in (".", "tests")]

from reporting import Masks, ious, origin, partners, photographs, reference_weights, table, timed  # noqa: E402
from seeded import ReferenceGenerator, SamPredictor, lively_state_dict, reference_with  # noqa: E402

from pipeline.amg import MaskGenerator  # noqa: E402
from pipeline.model import SamModel, load_model, pick_device  # noqa: E402
from pipeline.model.sam import Precision  # noqa: E402

Rgb = NDArray[np.uint8]

SETTINGS: Final[dict[str, dict[str, Any]]] = {
    "defaults": {},
    "crops": {"crop_n_layers": 1},
    "regions": {"min_mask_region_area": 100},
    "keep-many": {"pred_iou_thresh": -10.0, "stability_score_thresh": 0.0, "box_nms_thresh": 1.0},
}
_PHOTOGRAPH: Final = ["photograph", "size", "setting", "masks ref/ours"]
_SPEED: Final = ["s ref", "s ours", "ratio"]
_PAIRED: Final = ["parity", "same order", "smallest IoU", "RLE equal", "max d IoU score", "max d stability"]
_MATCHED: Final = ["matched", "mean IoU of matched", "unmatched share"]
COLUMNS: Final = {
    "fp32": [*_PHOTOGRAPH, *_PAIRED, *_SPEED],
    "bf16": [*_PHOTOGRAPH, *_MATCHED, *_SPEED],
}


def main() -> None:
    """Compare, and print or write the tables."""
    options = _options()
    warnings.simplefilter("ignore")
    device = pick_device(options.device)
    reference, address = _reference(options, device)
    settings = {name: SETTINGS[name] | {"points_per_side": options.points_per_side} for name in options.settings}
    pictures = photographs(Path(options.images), options.limit)
    precisions: list[Precision] = ["fp32", "bf16"] if options.precision == "both" else [options.precision]
    ours = {precision: load_model(address, device, precision, options.image_size) for precision in precisions}
    thresholds = dict(ours[precisions[0]].thresholds)

    first = next(iter(pictures.values()))
    warm_up = {"points_per_side": 2}
    for model in ours.values():
        MaskGenerator(model, **warm_up).generate(first)
    ReferenceGenerator(reference, **warm_up).generate(first)

    rows: dict[str, list[list[str]]] = {precision: [] for precision in precisions}
    differences = []
    for name, rgb in pictures.items():
        if "fp32" in ours:
            differences.append(_encoder_difference(reference, ours["fp32"], rgb))
        for setting, arguments in settings.items():
            told = {**thresholds, "points_per_batch": options.reference_batch, **arguments}
            generator = ReferenceGenerator(reference, **told)
            expected, reference_seconds = timed(partial(generator.generate, rgb), device)
            for precision, model in ours.items():
                masks, seconds = timed(partial(MaskGenerator(model, **arguments).generate, rgb), device)
                compare = _paired if precision == "fp32" else _matched
                row = [name, f"{rgb.shape[1]} x {rgb.shape[0]}", setting, f"{len(expected)}/{len(masks)}"]
                row += compare(masks, expected)
                row += [f"{reference_seconds:.2f}", f"{seconds:.2f}", f"{reference_seconds / seconds:.2f}"]
                rows[precision].append(row)
                print(f"{precision}: {', '.join(row)}", file=sys.stderr, flush=True)

    weights = options.checkpoint or f"seed {options.seed}"
    text = origin(device)
    text += f"* weights: {weights}; image size {options.image_size}, {options.points_per_side} points per side\n"
    if differences:
        text += f"* largest difference of embeddings in float32: {max(differences):.1e}\n"
    for precision in precisions:
        text += f"\n{precision}\n\n" + table([COLUMNS[precision], *rows[precision]])
    print(text)
    if options.output:
        Path(options.output).write_text("# Parity with the package mobile_sam\n\n" + text)
    verdicts = [row[len(_PHOTOGRAPH)] for row in rows.get("fp32", [])]
    if any(verdict != "yes" for verdict in verdicts) or max(differences, default=0.0) > 1e-4:
        sys.exit("no parity in float32")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="folder of JPEG and PNG photographs")
    parser.add_argument("--checkpoint", help="a .pt, .pth or .safetensors file of MobileSAM")
    parser.add_argument(
        "--reference-batch", type=int, default=64, help="prompts that the reference decodes at once: speed only"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random weights, without a checkpoint")
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "both"])
    parser.add_argument("--image-size", type=int, default=1024)
    parser.add_argument("--points-per-side", type=int, default=32)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--limit", type=int, help="photographs at most")
    parser.add_argument("--output", help="file that receives the table as Markdown")
    return parser.parse_args()


def _reference(options: argparse.Namespace, device: torch.device) -> tuple[Any, str]:
    """The reference on the device, and the address of its weights."""
    # cuDNN's convolutions round to TF32 by default, which is not float32.
    torch.backends.cudnn.allow_tf32 = False
    if options.checkpoint:
        weights, address = reference_weights(options.checkpoint), options.checkpoint
    else:
        weights = lively_state_dict(options.seed)
        address = str(Path(tempfile.mkdtemp()) / f"seed-{options.seed}.pt")
        torch.save(weights, address)
    # Its own buffers, such as the gathered attention biases, follow the second call of eval().
    return reference_with(weights, options.image_size).to(device), address


def _encoder_difference(reference: Any, model: SamModel, rgb: Rgb) -> float:
    """Largest absolute difference of the two embeddings of a photograph."""
    predictor = SamPredictor(reference)
    predictor.set_image(rgb)
    return float((predictor.features - model.encode(rgb).features_1CHW).abs().max())


def _paired(masks: Masks, expected: Masks) -> list[str]:
    """Parity, same order, smallest IoU, share of equal RLEs, largest differences of the scores."""
    if len(masks) != len(expected):
        return ["no: other number", "", "", "", "", ""]
    if not masks:
        return ["yes", "yes", "1", "100 %", "0", "0"]
    same_order = all(
        a["point_coords"] == b["point_coords"] and list(a["crop_box"]) == list(b["crop_box"])
        for a, b in zip(masks, expected, strict=True)
    )
    pairs = list(zip(masks, expected, strict=True))
    smallest = min(ious([a], [b])[0, 0] for a, b in pairs)
    equal = np.mean([a["segmentation"] == b["segmentation"] for a, b in pairs])
    differences = [
        np.nanmax([0.0, *(abs(a[score] - b[score]) for a, b in pairs)])
        for score in ("predicted_iou", "stability_score")
    ]
    parity = same_order and smallest >= 0.999 and max(differences) <= 1e-4
    return [
        "yes" if parity else "no",
        "yes" if same_order else "no",
        f"{smallest:.6f}",
        f"{100 * equal:.1f} %",
        *(f"{value:.1e}" for value in differences),
    ]


def _matched(masks: Masks, expected: Masks) -> list[str]:
    """Masks matched one to one, their mean IoU, and the share of the reference's and ours left without."""
    pairs = partners(masks, expected)
    total = len(masks) + len(expected)
    mean = f"{pairs.mean():.4f}" if len(pairs) else "-"
    return [str(len(pairs)), mean, f"{100 * (1 - 2 * len(pairs) / total):.1f} %" if total else "0 %"]


if __name__ == "__main__":
    main()
