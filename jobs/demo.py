"""The main job on a few sample photographs, on a local Ray: what `make demo` runs."""

import logging
from pathlib import Path
from typing import Final

import skimage.data
from PIL import Image

from jobs.command import run_command
from jobs.generate_masks import generate_masks
from jobs.seeded_checkpoint import seeded_checkpoint
from pipeline.config import AmgConfig, ModelConfig, RunConfig

_PHOTOGRAPHS: Final = ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field")
_log = logging.getLogger("everymask")


def demo(*, folder: Path = Path("demo-output")) -> int:
    """Find masks in scikit-image's photographs.

    No trained weights are part of this version. The demo's are random, so its masks show that everything
    runs and what is written, and mean nothing.

    Args:
        folder: Receives photographs, checkpoint and masks.
    """
    photographs = folder / "photographs"
    photographs.mkdir(parents=True, exist_ok=True)
    for name in _PHOTOGRAPHS:
        Image.fromarray(getattr(skimage.data, name)()).save(photographs / f"{name}.png")
    checkpoint = folder / "untrained.safetensors"
    seeded_checkpoint(output=str(checkpoint), seed=0, image_size=512)
    config = RunConfig(
        images=str(photographs),
        output=str(folder / "dataset"),
        overwrite=True,
        # Low thresholds: random weights are confident and stable nowhere, and all their boxes coincide.
        amg=AmgConfig(points_per_side=8, pred_iou_thresh=-10, stability_score_thresh=0, box_nms_thresh=1.0),
        model=ModelConfig(checkpoint=str(checkpoint)),
    )
    code = generate_masks(config=config)
    print(
        f"The masks are in {folder}/dataset/masks/, a row a photograph; README.md shows how to read them.\n"
        "They were made with untrained weights and mean nothing. For real ones, run\n"
        f"  .venv/bin/python -m jobs.generate_masks --images {photographs} --output OUTPUT\n"
        "which fetches MobileSAM's published weights."
    )
    return code


if __name__ == "__main__":
    run_command(demo, "jobs.demo")
