"""What rounding decides: the masks of the package mobile_sam and ours, each in float32 and in float64.

    python benchmarks/rounding.py --images FOLDER [--checkpoint demo] [--limit N] [--output FILE.md]

Every default, image size 1024. Told are the masks that are equal to the pixel, and the pixels that differ in all
of them together.
"""

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in (".", "tests")]

from pairs import float64_for_float32  # noqa: E402
from reporting import Masks, origin, photographs, reference_weights, table  # noqa: E402
from seeded import ReferenceGenerator, reference_with  # noqa: E402

from pipeline import rle  # noqa: E402
from pipeline.amg import MaskGenerator  # noqa: E402
from pipeline.model import load_model  # noqa: E402

Rgb = NDArray[np.uint8]

_COMPARED: Final = (
    ("mobile_sam", "everymask"),
    ("mobile_sam", "mobile_sam in float64"),
    ("everymask", "everymask in float64"),
    ("mobile_sam in float64", "everymask in float64"),
)


def main() -> None:
    """Compare, and print or write a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, type=Path, help="folder of JPEG and PNG photographs")
    parser.add_argument("--checkpoint", default="demo", help="of MobileSAM's architecture")
    parser.add_argument("--limit", type=int, help="photographs at most")
    parser.add_argument("--output", type=Path, help="file that receives the table as Markdown")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = [["photograph", "masks", "of", "and", "equal masks", "pixels that differ", "of pixels in masks"]]
    for name, rgb in photographs(options.images, options.limit).items():
        of = _masks(rgb, options.checkpoint)
        with float64_for_float32():
            of |= {f"{who} in float64": masks for who, masks in _masks(rgb, options.checkpoint).items()}
        if len({str([mask["point_coords"] for mask in masks]) for masks in of.values()}) > 1:
            sys.exit(f"{name}: other masks: compare with benchmarks/parity.py")
        pixels = sum(mask["area"] for mask in of["mobile_sam"])
        for a, b in _COMPARED:
            strays = [_differing(one, other) for one, other in zip(of[a], of[b], strict=True)]
            row = [name, str(len(strays)), a, b, str(strays.count(0)), str(sum(strays)), f"{pixels:,}"]
            print(*row, file=sys.stderr, flush=True)
            rows.append(row)
    text = origin(torch.device("cpu")) + f"* weights {options.checkpoint}; image size 1024, every default\n\n"
    text += table(rows)
    print(text)
    if options.output:
        options.output.write_text("# What rounding decides\n\n" + text)


def _masks(rgb: Rgb, checkpoint: str) -> dict[str, Masks]:
    model = load_model(checkpoint, "cpu", image_size=1024)
    reference = reference_with(reference_weights(checkpoint), 1024)
    return {
        "mobile_sam": ReferenceGenerator(reference, **model.thresholds).generate(rgb),
        "everymask": MaskGenerator(model).generate(rgb),
    }


def _differing(a: dict[str, Any], b: dict[str, Any]) -> int:
    if a["segmentation"] == b["segmentation"]:
        return 0
    return int(np.count_nonzero(rle.decode(a["segmentation"]) ^ rle.decode(b["segmentation"])))


if __name__ == "__main__":
    main()
