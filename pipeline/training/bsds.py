"""The Berkeley Segmentation Data Set (BSDS500): photographs, each divided into segments by several people.

https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/resources.html. For research and teaching.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import TrainingDataError

Split = Literal["train", "val", "test"]


@dataclass(frozen=True)
class Photograph:
    """A photograph and what people saw in it."""

    name: str
    rgb_HW3: NDArray[np.uint8]
    label_maps_HW: tuple[NDArray[np.uint16], ...]
    """One a person: the number of each pixel's segment, from 1."""


def photographs(folder: Path, split: Split) -> list[Path]:
    """The photographs of one split, in the order of their names; the folder has images/ and groundTruth/.

    Raises:
        TrainingDataError: there are none.
    """
    paths = sorted((folder / "images" / split).glob("*.jpg"))
    if not paths:
        raise TrainingDataError(f"{folder} holds no BSDS500: there is no JPEG in images/{split}.")
    return paths


def read_photograph(path: Path) -> Photograph:
    """One photograph of `photographs`, with its segmentations."""
    annotations = path.parents[2] / "groundTruth" / path.parent.name / f"{path.stem}.mat"
    with Image.open(path) as image:
        rgb_HW3 = np.array(image.convert("RGB"))
    return Photograph(path.stem, rgb_HW3, label_maps(annotations))


def label_maps(annotations: Path | IO[bytes]) -> tuple[NDArray[np.uint16], ...]:
    """What is in one file of groundTruth/: a label map H x W a person.

    Raises:
        TrainingDataError: there is no scipy to read it with.
        ValueError, LookupError, TypeError: it is no such file.
    """
    try:
        import scipy.io  # noqa: PLC0415 (comes with an extra, which measuring against other truths does not need)
    except ModuleNotFoundError as error:
        raise TrainingDataError(
            "BSDS500's .mat files need the extra train: pip install 'everymask[train]'"
        ) from error
    try:
        people = scipy.io.loadmat(annotations)["groundTruth"][0]
    except (NotImplementedError, scipy.io.matlab.MatReadError) as error:  # of MATLAB 7.3, and damaged ones
        raise ValueError(str(error)) from error
    return tuple(person["Segmentation"][0, 0] for person in people)


def segments(label_map_HW: NDArray[np.integer], smallest: float = 0.0) -> NDArray[np.bool_]:
    """The segments of a label map as masks, bool N x H x W, the largest first.

    Args:
        label_map_HW: Numbers of segments.
        smallest: Leave out segments of less than this share of the picture.
    """
    numbers, areas = np.unique(label_map_HW, return_counts=True)
    order = np.argsort(-areas, kind="stable")
    kept = [numbers[i] for i in order if areas[i] >= smallest * label_map_HW.size]
    masks: NDArray[np.bool_] = label_map_HW[None] == np.array(kept, label_map_HW.dtype)[:, None, None]
    return masks
