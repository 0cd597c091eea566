"""How alike two masks are, and how many segments a set of masks finds. Pure functions of arrays."""

from collections.abc import Sequence
from typing import Any, Final

import cv2
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco

from pipeline.amg.rle import Rle

IOU_THRESHOLDS: Final = np.linspace(0.5, 0.95, 10)
"""COCO's."""
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
    segments: int = ious_DG.shape[1]
    if segments == 0:
        return float("nan")
    matched = [_matched(ious_DG[:most], threshold) for threshold in IOU_THRESHOLDS.tolist()]
    return sum(matched) / (len(matched) * segments)


def _matched(ious_DG: NDArray[np.float64], threshold: float) -> int:
    free_DG = ious_DG[(ious_DG >= threshold).any(axis=1)].copy()
    matched = 0
    for mask in range(len(free_DG)):
        # Of equal overlaps COCO takes the last.
        segment = free_DG.shape[1] - 1 - int(free_DG[mask, ::-1].argmax())
        if free_DG[mask, segment] >= threshold:
            free_DG[:, segment] = -1
            matched += 1
    return matched


def coverage(masks: Sequence[Rle], height: int, width: int) -> float:
    """Share of the picture's pixels that lie in at least one of the masks."""
    return float(coco.area(coco.merge(list(masks)))) / (height * width) if masks else 0.0
