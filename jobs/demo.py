"""The main job on a few sample photographs, on a local Ray: what `make demo` runs."""

from pathlib import Path
from typing import Final

import numpy as np
import pyarrow.parquet as pq
import skimage.data
from PIL import Image

from jobs.command import run_command
from jobs.generate_masks import generate_masks
from jobs.report import report
from pipeline.config import AmgConfig, MasksConfig, ModelConfig
from pipeline.overlay import overlay

_PHOTOGRAPHS: Final = ("astronaut", "chelsea", "coffee", "rocket", "retina")


def demo(*, folder: Path = Path("demo-output")) -> int:
    """Find all masks in scikit-image's photographs with the weights that come along, and show them.

    Args:
        folder: Receives photographs, masks, pictures of the masks, and a report of them.
    """
    photographs, overlays = folder / "photographs", folder / "overlays"
    for path in (photographs, overlays):
        path.mkdir(parents=True, exist_ok=True)
    for name in _PHOTOGRAPHS:
        Image.fromarray(getattr(skimage.data, name)()).save(photographs / f"{name}.png")
    config = MasksConfig(
        images=str(photographs),
        output=str(folder / "dataset"),
        overwrite=True,
        amg=AmgConfig(points_per_side=16),  # a quarter of the default prompts, for the time
        model=ModelConfig(model="demo"),
    )
    code = generate_masks(config=config)
    for row in pq.read_table(f"{folder}/dataset/masks").to_pylist():
        path = Path(row["uri"].removeprefix("file://"))
        rgb_HW3 = np.array(Image.open(path).convert("RGB"))
        Image.fromarray(overlay(rgb_HW3, row["masks"])).save(overlays / f"{path.stem}.jpg", quality=90)
        print(f"{path.name}: {len(row['masks'])} masks")
    report(input=config.output, output=f"{folder}/report")
    print(
        f"The masks are in {folder}/dataset/masks/, a row a photograph; README.md shows how to read them.\n"
        f"{folder}/report/index.html shows them in a browser, {folder}/overlays/ as pictures. They are of the\n"
        "small weights that come along; for MobileSAM's own, run\n"
        f"  .venv/bin/python -m jobs.generate_masks --images {photographs} --output OUTPUT\n"
        "which fetches them."
    )
    return code


if __name__ == "__main__":
    run_command(demo, "jobs.demo")
