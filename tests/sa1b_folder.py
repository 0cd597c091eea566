"""Folders laid out as SA-1B, with masks made here, and masks datasets made of them."""

import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from known_masks import Mask
from PIL import Image
from running import call

from pipeline import rle


def annotation(mask_HW: Mask, predicted_iou: float = 0.9, stability_score: float = 0.97) -> dict[str, Any]:
    """As in SA-1B: the box has width and height of last minus first."""
    height, width = mask_HW.shape
    y, x = np.nonzero(mask_HW)
    box = [x.min(), y.min(), x.max() - x.min(), y.max() - y.min()] if len(x) else [0, 0, 0, 0]
    return {
        "id": 1,
        "segmentation": rle.encode(mask_HW),
        "area": int(mask_HW.sum()),
        "bbox": [float(value) for value in box],
        "predicted_iou": predicted_iou,
        "point_coords": [[1.5, 2.5]],
        "stability_score": stability_score,
        "crop_box": [0, 0, width, height],
    }


def write_sa1b(folder: Path, images: Mapping[str, Sequence[dict[str, Any]]], size: tuple[int, int]) -> Path:
    """A grey image and its JSON by name; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    height, width = size
    for number, (name, annotations) in enumerate(images.items()):
        Image.new("RGB", (width, height), "grey").save(folder / f"{name}.jpg")
        image = {"image_id": number, "width": width, "height": height, "file_name": f"{name}.jpg"}
        (folder / f"{name}.json").write_text(json.dumps({"image": image, "annotations": list(annotations)}))
    return folder


def tarred(folder: Path) -> Path:
    """The same files in a tar beside the folder."""
    with tarfile.open(folder.with_suffix(".tar"), "w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, f"./{path.name}")
    return folder.with_suffix(".tar")


def imported(images: Path, output: Path, *flags: str) -> Path:
    """A masks dataset of a folder or tar."""
    settings = ["--images", images, "--output", output, "--processes", "1"]
    finished = call("jobs.import_sa1b", *settings, *flags)
    assert finished.returncode == 0, finished.stderr
    return output
