"""How alike two masks are, and how many segments a set of masks finds. Pure functions of arrays."""

from collections.abc import Iterable, Sequence
from typing import Any, Final

import cv2
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco

from pipeline.rle import Rle

IOU_THRESHOLDS: Final = np.linspace(0.5, 0.95, 10)
"""COCO's."""
NOBODY: Final = np.iinfo(np.int64).max
"""No mask takes a segment: later than all of them."""
CONTOUR_RATIO: Final = 0.0075
"""How far contours may be apart as a share of the picture's diagonal, of Martin et al. 2004."""
BOUNDARY_RATIO: Final = 0.02
"""Width of the boundary as a share of the picture's diagonal, of Cheng et al. 2021 for COCO."""


def mask_iou(a_HW: NDArray[np.bool_], b_HW: NDArray[np.bool_]) -> Any:
    """Intersection over union (Jaccard index), 0 to 1; two empty masks are the same and have 1.

    Args:
        a_HW: Masks of one size; axes before the last two are broadcast.
        b_HW: The same.

    Returns:
        float64 of the broadcast axes' shape; a scalar for two masks.
    """
    intersection = np.sum(a_HW & b_HW, axis=(-2, -1))
    union = np.sum(a_HW, axis=(-2, -1)) + np.sum(b_HW, axis=(-2, -1)) - intersection
    return np.where(union > 0, intersection / np.maximum(union, 1), 1.0)[()]


def boundary(mask_HW: NDArray[np.bool_], dilation_ratio: float = BOUNDARY_RATIO) -> NDArray[np.bool_]:
    """The pixels of a mask that are near its contour.

    Near is a chessboard distance of at most d = round(`dilation_ratio` x diagonal) pixels, at least 1, to a
    pixel outside the mask; outside is also what lies beyond the picture. So computes the code of the paper,
    https://github.com/bowenc0221/boundary-iou-api.
    """
    height, width = mask_HW.shape
    distance = max(1, round(dilation_ratio * float(np.hypot(height, width))))
    padded = np.pad(mask_HW.astype(np.uint8), 1)
    # A 3 x 3 square as often as the distance says; beyond the padding OpenCV sees no background.
    eroded = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=distance)[1:-1, 1:-1]
    near: NDArray[np.bool_] = mask_HW & (eroded == 0)
    return near


def boundary_iou(
    a_HW: NDArray[np.bool_], b_HW: NDArray[np.bool_], dilation_ratio: float = BOUNDARY_RATIO
) -> float:
    """IoU of two masks' boundaries, 0 to 1 (Cheng et al. 2021, https://arxiv.org/abs/2103.16562).

    For masks that are thinner than the boundary is wide it is their IoU. Two empty masks have 1.
    """
    return float(mask_iou(boundary(a_HW, dilation_ratio), boundary(b_HW, dilation_ratio)))


def iou_matrix(found: Sequence[Rle], wanted: Sequence[Rle]) -> NDArray[np.float64]:
    """IoU of each of D masks with each of G masks of the same picture, D x G."""
    if not found or not wanted:
        return np.zeros((len(found), len(wanted)))
    ious: NDArray[np.float64] = coco.iou(list(found), list(wanted), [0] * len(wanted))
    return ious


def average_recall(ious_DG: NDArray[np.float64], most: int) -> float:
    """AR@`most` in one picture without classes: COCO's, https://cocodataset.org/#detection-eval.

    At each IoU threshold from 0.50 to 0.95 in steps of 0.05 the masks, the best score first, take the segment
    that they overlap most and that no mask before them has taken, if the IoU reaches the threshold. Recall is
    the share of segments that are taken; returned is its mean over the thresholds.

    Args:
        ious_DG: IoU of D masks, the best score first, with G segments.
        most: Masks that count, from the first on.

    Returns:
        0 to 1; NaN without segments.
    """
    if ious_DG.shape[1] == 0:
        return float("nan")
    return float((taken_by(ious_DG) < most).mean())


def taken_by(ious_DG: NDArray[np.float64]) -> NDArray[np.int64]:
    """Which mask takes each segment at each IoU threshold, T x G, as `average_recall` has it; else `NOBODY`.

    As masks choose one after another, what the first of them take does not depend on how many there are.

    Args:
        ious_DG: IoU of D masks, the best score first, with G segments.
    """
    taken_TG = np.full((len(IOU_THRESHOLDS), ious_DG.shape[1]), NOBODY)
    for taken_G, threshold in zip(taken_TG, IOU_THRESHOLDS.tolist(), strict=True):
        able = np.flatnonzero((ious_DG >= threshold).any(axis=1))
        free_DG = ious_DG[able]
        for mask, free_G in zip(able, free_DG, strict=True):
            # Of equal overlaps COCO takes the last.
            segment = len(free_G) - 1 - int(free_G[::-1].argmax())
            if free_G[segment] >= threshold:
                free_DG[:, segment] = -1
                taken_G[segment] = mask
    return taken_TG


def contours(masks: Iterable[NDArray[np.bool_]], size: tuple[int, int]) -> NDArray[np.bool_]:
    """The pixels H x W whose right or lower neighbour is on the other side of some mask's border.

    The picture's own border is none.

    Args:
        masks: Of one picture, bool H x W each.
        size: The picture's height and width.
    """
    edges_HW = np.zeros(size, bool)
    for mask_HW in masks:
        edges_HW[:, :-1] |= mask_HW[:, :-1] != mask_HW[:, 1:]
        edges_HW[:-1] |= mask_HW[:-1] != mask_HW[1:]
    return edges_HW


def boundary_recall(found_HW: NDArray[np.bool_], wanted_HW: NDArray[np.bool_]) -> float:
    """Share of the wanted contours that lie near found ones: within 0.0075 of the diagonal.

    Near is a chessboard distance, of at least a pixel. After Martin et al. 2004,
    https://doi.org/10.1109/TPAMI.2004.1273918, who also match pixels one to one.

    Returns:
        0 to 1; NaN where there are no wanted contours.
    """
    if not wanted_HW.any():
        return float("nan")
    distance = max(1, round(CONTOUR_RATIO * float(np.hypot(*wanted_HW.shape))))
    near_HW = cv2.dilate(found_HW.astype(np.uint8), np.ones((2 * distance + 1, 2 * distance + 1), np.uint8))
    return float((near_HW[wanted_HW] > 0).mean())


def coverage(masks: Sequence[Rle], height: int, width: int) -> float:
    """Share of the picture's pixels that lie in at least one of the masks."""
    return float(coco.area(coco.merge(list(masks)))) / (height * width) if masks else 0.0
