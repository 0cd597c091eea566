"""A masks dataset against what is true of its images: recall by COCO's protocol without classes, and contours.

As average recall in COCO, https://cocodataset.org/#detection-eval, with up to 1000 masks an image: segments of all
images are pooled, and told apart by their area. Where several people marked an image, each is asked for all of his
segments, as if his were another image.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pipeline import rle
from pipeline.evaluation.metrics import boundary_recall, contours, iou_matrix, taken_by
from pipeline.evaluation.truth import Marked, Truth

MOST: Final = (10, 100, 1000)
"""Masks of an image that count, those of the best predicted IoU."""
SIZES: Final = {
    "all": (0.0, 1e10),
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, 1e10),
}
"""Areas of segments in pixels, COCO's; both ends belong to a range."""

Row = dict[str, Any]


@dataclass(frozen=True)
class SizeScores:
    """One person's segments of one image and one range of areas."""

    recalled_M: NDArray[np.float64]
    """Segments that are found among the first `MOST` masks: means over IoU thresholds."""
    best_iou_N: NDArray[np.float64]
    """Of each segment with the mask most like it, of all masks."""


@dataclass(frozen=True)
class PersonScores:
    """One person's segments of one image."""

    by_size: Mapping[str, SizeScores]
    boundary_recall: float
    """NaN where there are no contours inside the image."""


@dataclass
class Matching:
    """Images that were measured, and those that could not be."""

    measured: int = 0
    without_truth: int = 0
    """In the dataset only."""
    truth_only: int = 0
    """In the truth, and not among the rows."""
    other_size: int = 0
    """Of another size there than here: not the same picture."""


def measure(rows: Iterable[Row], truth: Truth, matching: Matching) -> Iterator[list[PersonScores]]:
    """The people's scores of each image that both sides have.

    An image that failed when the masks were made counts as one without masks.

    Args:
        rows: Of a masks dataset.
        truth: What is true.
        matching: Is filled as the rows are gone through; complete at the end.

    Raises:
        TrainingDataError: the truth of an image is damaged.
    """
    seen = 0
    for row in rows:
        read = truth.images.get(row["uri"])
        if read is None:
            matching.without_truth += 1
            continue
        seen += 1
        marked = read()
        if (
            not marked.people
            or row["height"] not in {None, marked.size[0]}
            or row["width"] not in {None, marked.size[1]}
        ):
            matching.other_size += 1
            continue
        matching.measured += 1
        yield of_image(row["masks"], marked)
    matching.truth_only = truth.total - seen


def of_image(masks: list[Row], marked: Marked) -> list[PersonScores]:
    """All masks of an image against each person's segments."""
    found = [mask["segmentation"] for mask in sorted(masks, key=lambda mask: -float(mask["predicted_iou"]))]
    found_HW = contours(map(rle.decode, found), marked.size)
    scores = []
    for segments in marked.people:
        wanted_HW = contours((rle.decode(segment.rle) for segment in segments), marked.size)
        ious_DG = iou_matrix(found, [segment.rle for segment in segments])
        areas_G = np.array([segment.area for segment in segments])
        by_size = {
            name: _of_size(ious_DG[:, (areas_G >= low) & (areas_G <= high)]) for name, (low, high) in SIZES.items()
        }
        scores.append(PersonScores(by_size, boundary_recall(found_HW, wanted_HW)))
    return scores


def _of_size(ious_DG: NDArray[np.float64]) -> SizeScores:
    taken_TG = taken_by(ious_DG)
    recalled_M = np.array([(taken_TG < most).sum(axis=1).mean() for most in MOST])
    return SizeScores(recalled_M, ious_DG.max(axis=0, initial=0.0))
