"""Masks whose values are known, and a setting that keeps every mask of a model."""

import numpy as np
import scipy.ndimage
from numpy.typing import NDArray

from pipeline.config import AmgConfig

Mask = NDArray[np.bool_]
KEEP_ALL = AmgConfig(points_per_side=4, pred_iou_thresh=-10, stability_score_thresh=0, box_nms_thresh=1.0)


def box(size: tuple[int, int], top: int, left: int, bottom: int, right: int) -> Mask:
    mask = np.zeros(size, bool)
    mask[top:bottom, left:right] = True
    return mask


def blobs(count: int, height: int, width: int, seed: int = 0) -> Mask:
    """Masks with ragged contours, holes and islands, some at the picture's edge; each has a pixel."""
    noise = np.random.default_rng(seed).normal(size=(count, height, width))
    masks: Mask = scipy.ndimage.gaussian_filter(noise, (0, 4, 4)) > 0
    return masks
