"""How far float32 is from exact arithmetic: the masks of the package mobile_sam and ours beside those in float64.

    python benchmarks/rounding.py --images FOLDER [--checkpoint demo] [--limit N] [--output FILE.md]

Every default, image size 1024. Of each photograph the masks that mobile_sam keeps are made again by its encoder
and decoder in float64; prompts are encoded in float32, as both do it. Told are the masks that are equal to the
pixel, and the pixels that differ in all of them together.
"""

import argparse
import copy
import sys
import warnings
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco

sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in (".", "tests")]

from reporting import Masks, origin, photographs, reference_weights, table  # noqa: E402
from seeded import ReferenceGenerator, SamPredictor, reference_with  # noqa: E402

from pipeline import rle  # noqa: E402
from pipeline.amg import MaskGenerator  # noqa: E402
from pipeline.model import load_model  # noqa: E402

Rgb = NDArray[np.uint8]

_PROMPTS_AT_ONCE: Final = 8


def main() -> None:
    """Compare, and print or write a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, type=Path, help="folder of JPEG and PNG photographs")
    parser.add_argument("--checkpoint", default="demo", help="of MobileSAM's architecture")
    parser.add_argument("--limit", type=int, help="photographs at most")
    parser.add_argument("--output", type=Path, help="file that receives the table as Markdown")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    model = load_model(options.checkpoint, "cpu", image_size=1024)
    reference = reference_with(reference_weights(options.checkpoint), 1024)
    exact = copy.deepcopy(reference).double()
    exact.eval()  # its gathered attention biases follow the second call
    rows = [["photograph", "masks", "of", "and", "equal masks", "pixels that differ", "of pixels in masks"]]
    for name, rgb in photographs(options.images, options.limit).items():
        generator = ReferenceGenerator(reference, output_mode="coco_rle", **model.thresholds)
        of = {"mobile_sam": generator.generate(rgb), "everymask": MaskGenerator(model).generate(rgb)}
        if [mask["point_coords"] for mask in of["mobile_sam"]] != [
            mask["point_coords"] for mask in of["everymask"]
        ]:
            sys.exit(f"{name}: other masks: compare with benchmarks/parity.py")
        of["mobile_sam in float64"] = _made_again(exact, reference, rgb, of["mobile_sam"])
        pixels = sum(mask["area"] for mask in of["mobile_sam"])
        for a, b in (
            ("mobile_sam", "everymask"),
            ("mobile_sam", "mobile_sam in float64"),
            ("everymask", "mobile_sam in float64"),
        ):
            strays = [_differing(one, other) for one, other in zip(of[a], of[b], strict=True)]
            row = [name, str(len(strays)), a, b, str(strays.count(0)), str(sum(strays)), f"{pixels:,}"]
            print(*row, file=sys.stderr, flush=True)
            rows.append(row)
    text = origin(torch.device("cpu")) + f"* weights {options.checkpoint}\n\n{table(rows)}"
    print(text)
    if options.output:
        options.output.write_text("# What float32 decides\n\n" + text)


@torch.no_grad()
def _made_again(exact: Any, reference: Any, rgb: Rgb, masks: Masks) -> Masks:
    """The same masks by encoder and decoder in float64: of each prompt the one whose predicted IoU is the same."""
    predictor = SamPredictor(reference)
    transform = predictor.transform
    pixels_13HW = torch.as_tensor(transform.apply_image(rgb)).permute(2, 0, 1)[None]
    features = exact.image_encoder(reference.preprocess(pixels_13HW).double())
    made: Masks = []
    for start in range(0, len(masks), _PROMPTS_AT_ONCE):
        few = masks[start : start + _PROMPTS_AT_ONCE]
        points = transform.apply_coords(np.array([mask["point_coords"] for mask in few]), rgb.shape[:2])
        labels = torch.ones(points.shape[:2], dtype=torch.int)
        sparse, dense = reference.prompt_encoder((torch.as_tensor(points), labels), boxes=None, masks=None)
        logits, iou_N3 = exact.mask_decoder(
            image_embeddings=features,
            image_pe=reference.prompt_encoder.get_dense_pe().double(),
            sparse_prompt_embeddings=sparse.double(),
            dense_prompt_embeddings=dense.double(),
            multimask_output=True,
        )
        whole = exact.postprocess_masks(logits, tuple(pixels_13HW.shape[-2:]), rgb.shape[:2])
        expected_N1 = torch.tensor([[mask["predicted_iou"]] for mask in few])
        which_N = (iou_N3 - expected_N1).abs().argmin(dim=1)
        chosen_NHW = (whole[torch.arange(len(few)), which_N] > 0).numpy()
        encoded = coco.encode(np.asfortranarray(chosen_NHW.transpose(1, 2, 0).astype(np.uint8)))
        made += [{"segmentation": {**one, "counts": one["counts"].decode()}} for one in encoded]
    return made


def _differing(a: dict[str, Any], b: dict[str, Any]) -> int:
    if a["segmentation"] == b["segmentation"]:
        return 0
    return int(np.count_nonzero(rle.decode(a["segmentation"]) ^ rle.decode(b["segmentation"])))


if __name__ == "__main__":
    main()
