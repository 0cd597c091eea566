"""What the masks of a dataset are like, without any truth: scores, sizes, and how they lie in one another."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco

from pipeline.rle import Rle, areas

CONTAINED: Final = 0.95
"""Share of a mask's pixels in a larger one from which it lies in it."""
QUANTILES: Final = (0.05, 0.25, 0.5, 0.75, 0.95)
DEEPEST: Final = 5
"""Depths from here on are counted together."""


@dataclass(frozen=True)
class Distributions:
    """Of I images that were processed, and N masks of all of them."""

    masks_I: NDArray[np.int64]
    """Masks of each image."""
    predicted_iou_N: NDArray[np.float32]
    stability_N: NDArray[np.float32]
    """NaN where a mask has none."""
    share_N: NDArray[np.float32]
    """Of its image, in each mask."""
    depth_N: NDArray[np.int16]
    """How many larger masks of the image each one lies in."""


def distributions(rows: Iterable[dict[str, Any]]) -> Distributions:
    """Go through rows of a masks dataset that were processed. Memory grows by 14 bytes a mask."""
    counts: list[int] = []
    parts: list[tuple[NDArray[np.float32], NDArray[np.int16]]] = []
    for row in rows:
        masks = row["masks"]
        counts.append(len(masks))
        pixels = row["height"] * row["width"]
        scores = [(mask["predicted_iou"], mask["stability_score"], mask["area"] / pixels) for mask in masks]
        depth_N = depths([mask["segmentation"] for mask in masks])
        parts.append((np.array(scores, np.float32).reshape(-1, 3), depth_N))
    scores_N3 = np.concatenate([np.zeros((0, 3), np.float32), *(scores for scores, _ in parts)])
    depth_N = np.concatenate([np.zeros(0, np.int16), *(depth for _, depth in parts)])
    predicted_iou_N, stability_N, share_N = scores_N3.T
    return Distributions(np.array(counts, np.int64), predicted_iou_N, stability_N, share_N, depth_N)


def depths(masks: list[Rle]) -> NDArray[np.int16]:
    """Of each mask of an image, how many larger masks it lies in. Of two alike, none lies in the other."""
    if not masks:
        return np.zeros(0, np.int16)
    inside_NN = coco.iou(masks, masks, [1] * len(masks)) >= CONTAINED  # of a crowd: share of the first mask
    area_N = areas(masks)
    depth_N: NDArray[np.int16] = np.sum(inside_NN & (area_N[:, None] < area_N[None]), axis=1, dtype=np.int16)
    return depth_N
