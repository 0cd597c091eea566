"""What bfloat16 costs in accuracy: all masks of BSDS500's photographs in float32 beside those in bfloat16.

    python benchmarks/agreement.py --bsds FOLDER [--limit 100] [--checkpoint demo] [--output FILE.md]

Masks of a photograph are matched one to one so that the sum of their IoUs is largest; a pair below 0.5 is none.
The average recall is against the segments that people marked, as in `jobs.evaluate_model`. With `--reference` the
float32 masks of the first so many photographs are matched with those of the package mobile_sam, too.
"""

import argparse
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in (".", "tests")]

from reporting import Masks, origin, partners, reference_weights, table, timed  # noqa: E402
from seeded import ReferenceGenerator, reference_with  # noqa: E402

from pipeline.amg import MaskGenerator  # noqa: E402
from pipeline.evaluation.against_masks import proposal_scores, segments_of  # noqa: E402
from pipeline.evaluation.pictures import bsds_pictures  # noqa: E402
from pipeline.model import load_model, pick_device  # noqa: E402


class Seen(NamedTuple):
    """The masks of one photograph by one method."""

    masks: Masks
    seconds: float
    recall: float


def main() -> None:
    """Compare, and print or write the table."""
    options = _options()
    warnings.simplefilter("ignore")
    device = pick_device(options.device)
    models = {
        precision: load_model(options.checkpoint, device, precision, options.image_size)
        for precision in ("fp32", "bf16")
    }
    image_size, thresholds = models["fp32"].image_size, dict(models["fp32"].thresholds)
    generators: dict[str, Any] = {
        precision: MaskGenerator(model, points_per_side=options.points_per_side)
        for precision, model in models.items()
    }
    if options.reference:
        generators["mobile_sam"] = ReferenceGenerator(
            reference_with(reference_weights(options.checkpoint), image_size).to(device),
            points_per_side=options.points_per_side,
            **thresholds,
        )
    seen: dict[str, list[Seen]] = {name: [] for name in generators}
    for index, picture in enumerate(bsds_pictures(Path(options.bsds), options.split, options.limit)):
        segments = segments_of(picture)
        for name, generator in generators.items():
            if name == "mobile_sam" and index >= options.reference:
                continue
            if index == 0:
                generator.generate(picture.rgb_HW3)  # warms up
            masks, seconds = timed(partial(generator.generate, picture.rgb_HW3), device)
            ranked = sorted(masks, key=lambda mask: -mask["predicted_iou"])
            scores = proposal_scores([mask["segmentation"] for mask in ranked], segments)
            seen[name].append(Seen(masks, seconds, scores.average_recall))
        print(f"{index + 1}: {picture.name}", file=sys.stderr, flush=True)

    rows = [_HEAD, _row("bf16", "fp32", seen)]
    if options.reference:
        rows.append(_row("fp32", "mobile_sam", seen))
    text = origin(device) + (
        f"* BSDS500 {options.split}, the first {options.limit} photographs by name; weights {options.checkpoint}, "
        f"image size {image_size}, {options.points_per_side} points per side, {thresholds}\n\n"
    )
    text += table(rows)
    print(text)
    if options.output:
        Path(options.output).write_text("# Agreement of bfloat16 with float32\n\n" + text)


_HEAD = [
    "masks of",
    "against",
    "photographs",
    "masks",
    "mean IoU of matched",
    "without partner",
    "photographs of another count",
    "AR@1000",
    "AR@1000 against",
    "s a photograph",
    "ratio",
]


def _row(name: str, against: str, seen: dict[str, list[Seen]]) -> list[str]:
    pairs = list(zip(seen[name], seen[against], strict=False))
    matched = [partners(a.masks, b.masks) for a, b in pairs]
    ious = np.concatenate(matched)
    counts = np.array([[len(a.masks), len(b.masks)] for a, b in pairs])
    seconds = np.array([[a.seconds, b.seconds] for a, b in pairs]).mean(axis=0)
    recalls = np.nanmean([[a.recall, b.recall] for a, b in pairs], axis=0)
    return [
        name,
        against,
        str(len(pairs)),
        f"{counts[:, 0].sum()} / {counts[:, 1].sum()}",
        f"{ious.mean():.4f}",
        f"{100 * (1 - 2 * len(ious) / counts.sum()):.2f} %",
        str((counts[:, 0] != counts[:, 1]).sum()),
        f"{recalls[0]:.4f}",
        f"{recalls[1]:.4f}",
        f"{seconds[0]:.2f} / {seconds[1]:.2f}",
        f"{seconds[1] / seconds[0]:.2f}",
    ]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bsds", required=True, help="folder of BSDS500")
    parser.add_argument("--split", default="val", choices=["train", "val"])
    parser.add_argument("--limit", type=int, default=100, help="photographs at most")
    parser.add_argument("--reference", type=int, default=0, help="photographs that mobile_sam sees, too")
    parser.add_argument("--checkpoint", default="demo", help="a model's name or a checkpoint's address")
    parser.add_argument("--image-size", type=int, help="by default the checkpoint's")
    parser.add_argument("--points-per-side", type=int, default=32)
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    parser.add_argument("--output", help="file that receives the table as Markdown")
    return parser.parse_args()


if __name__ == "__main__":
    main()
