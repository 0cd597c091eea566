"""Folders laid out as BSDS500, with pictures made here."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import scipy.io
from numpy.typing import NDArray
from PIL import Image

Labelled = tuple[NDArray[np.uint8], Sequence[NDArray[np.uint16]]]
"""A picture, and the label map of each person."""


def write_bsds(folder: Path, photographs: Mapping[str, Labelled], split: str = "val") -> Path:
    """Write one split and return the folder."""
    images, annotations = folder / "images" / split, folder / "groundTruth" / split
    images.mkdir(parents=True)
    annotations.mkdir(parents=True)
    for name, (rgb_HW3, label_maps) in photographs.items():
        Image.fromarray(rgb_HW3).save(images / f"{name}.jpg", quality=95)
        people = np.empty((1, len(label_maps)), dtype=object)
        for i, label_map in enumerate(label_maps):
            people[0, i] = {"Segmentation": label_map}
        scipy.io.savemat(annotations / f"{name}.mat", {"groundTruth": people})
    return folder
