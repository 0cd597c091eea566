"""What drops a mask by itself: pure functions from masks to those that stay, in their order."""

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.curation.arithmetic import in_box

Record = dict[str, Any]
"""A mask of a row of the masks table."""


def scores(masks: list[Record], name: str) -> NDArray[np.float32]:
    """A column of masks, in the precision in which it was computed and is stored."""
    return np.array([mask[name] for mask in masks], np.float32)


def confident(masks: list[Record], threshold: float) -> list[Record]:
    """Those whose predicted IoU is above the threshold; all of them if that is 0 or less."""
    return masks if threshold <= 0 else _those(masks, scores(masks, "predicted_iou") > np.float32(threshold))


def stable(masks: list[Record], threshold: float) -> list[Record]:
    """Those whose stability score is at least the threshold; all of them if that is 0 or less."""
    return masks if threshold <= 0 else _those(masks, scores(masks, "stability_score") >= np.float32(threshold))


def of_area(masks: list[Record], least: float, most: float) -> list[Record]:
    """Those of so many pixels, both ends included."""
    return [mask for mask in masks if least <= mask["area"] <= most]


def compact(masks: list[Record], max_aspect_ratio: float) -> list[Record]:
    """Those whose box's longer side is at most so many times the shorter, both counted in pixels."""
    return [mask for mask in masks if _aspect_ratio(mask) <= max_aspect_ratio]


def off_the_border(masks: list[Record], max_sides: int) -> list[Record]:
    """Those with pixels in at most so many of the image's first row, last row, first column, last column."""
    return [mask for mask in masks if _sides(mask) <= max_sides]


def solid(masks: list[Record], max_fraction: float) -> list[Record]:
    """Those whose holes are at most this share of mask and holes together.

    A hole is a region of background, 8-connected as in segment-anything's clean-up, that does not reach the edge
    of the mask's box.
    """
    if max_fraction >= 1:
        return masks
    return [mask for mask in masks if hole_fraction(mask) <= max_fraction]


def hole_fraction(mask: Record) -> float:
    """Share of the pixels of a mask and its holes together that are holes."""
    pixels_HW = in_box(mask["segmentation"], mask["bbox"])
    _, labels_HW, stats, _ = cv2.connectedComponentsWithStats((~pixels_HW).view(np.uint8), connectivity=8)
    areas = stats[:, cv2.CC_STAT_AREA].astype(np.int64)
    edges = (labels_HW[0], labels_HW[-1], labels_HW[:, 0], labels_HW[:, -1])
    areas[np.unique(np.concatenate(edges))] = 0
    areas[0] = 0  # the mask itself
    holes = int(areas.sum())
    return holes / (holes + mask["area"]) if holes else 0.0


def _aspect_ratio(mask: Record) -> float:
    _, _, width, height = mask["bbox"]
    short, long = sorted((width + 1, height + 1))
    return float(long / short)


def _sides(mask: Record) -> int:
    if not mask["area"]:
        return 0
    (left, top, width, height), size = mask["bbox"], mask["segmentation"]["size"]
    return sum((left == 0, top == 0, left + width == size[1] - 1, top + height == size[0] - 1))


def _those(masks: list[Record], keep: NDArray[np.bool_]) -> list[Record]:
    return [mask for mask, kept in zip(masks, keep.tolist(), strict=True) if kept]
