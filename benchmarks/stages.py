"""Where the time of an image goes: seconds and masks of each stage of `MaskGenerator.generate`.

    python benchmarks/stages.py [PHOTOGRAPH ...] [--precision fp32] [--threads N] [--no-kernels] [--output FILE.md]

Without photographs, scikit-image's cup of coffee. On a CPU, where nothing runs on after a call has returned.
Seconds are the processor's, of all threads: divided by their number they are at least the time that passed.
"""

import argparse
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import skimage.data
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from reporting import origin, table

from pipeline.amg import MaskGenerator, generator, selection
from pipeline.model import load_model
from pipeline.model.sam import SamModel

STAGES: Final[dict[str, tuple[Any, str]]] = {
    "encoder": (SamModel, "encode"),
    "tables of the image": (SamModel, "prepare"),
    "decoding to the predicted IoU": (SamModel, "predict"),
    "upscaling": (SamModel, "upscale"),
    "bounds of boxes": (generator, "bounds"),
    "stability and box": (selection, "measure"),
    "masks at full size": (generator, "full_size_masks"),
    "RLE": (generator, "encode_in_image"),
}
COUNTED: Final = {"bounds of boxes", "stability and box"}
"""Stages whose first argument is masks."""


def main() -> None:
    """Measure, and print or write a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", nargs="*", type=Path)
    parser.add_argument("--checkpoint", default="demo")
    parser.add_argument("--image-size", type=int, default=1024)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-kernels", action="store_true", help="the decoder in plain PyTorch")
    parser.add_argument("--output", help="file that receives the table as Markdown")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    pictures = {path.name: np.array(Image.open(path).convert("RGB")) for path in options.photographs} or {
        "coffee": skimage.data.coffee()
    }
    settings = (options.checkpoint, "cpu", options.precision, options.image_size)
    masks = MaskGenerator(load_model(*settings, kernels=not options.no_kernels))
    MaskGenerator(masks.model, points_per_side=2).generate(next(iter(pictures.values())))  # warms up
    seconds, counts = defaultdict[str, float](float), Counter[str]()
    for stage, (owner, name) in STAGES.items():
        setattr(owner, name, _timed(getattr(owner, name), stage, seconds, counts))
    rows = [["photograph", "size", "stage", "masks", "s"]]
    for name, rgb in pictures.items():
        seconds.clear()
        counts.clear()
        start = time.process_time()
        kept = len(masks.generate(rgb))
        whole = time.process_time() - start
        size = f"{rgb.shape[1]} x {rgb.shape[0]}"
        rows += [[name, size, stage, str(counts[stage] or ""), f"{seconds[stage]:.2f}"] for stage in STAGES]
        rows.append([name, size, "all", str(kept), f"{whole:.2f}"])
    text = origin(torch.device("cpu"))
    text += (
        f"* weights {options.checkpoint}, image size {options.image_size}, {options.precision}, decoder "
        f"{masks.model.decoder_class.__name__}\n\n{table(rows)}"
    )
    print(text)
    if options.output:
        Path(options.output).write_text("# Where the time goes\n\n" + text)


def _timed(
    stage: Callable[..., Any], name: str, seconds: dict[str, float], counts: Counter[str]
) -> Callable[..., Any]:
    def timed(*arguments: Any, **keywords: Any) -> Any:
        start = time.process_time()
        result = stage(*arguments, **keywords)
        if name == "masks at full size":
            result = list(result)  # a generator
        seconds[name] += time.process_time() - start
        if name in COUNTED:
            counts[name] += len(arguments[0])
        return result

    return timed


if __name__ == "__main__":
    main()
