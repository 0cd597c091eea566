"""Masks that overlap, made a partition: each pixel belongs to one of them at most."""

import numpy as np

from pipeline import rle
from pipeline.curation.arithmetic import box_of, complement, from_counts, intersection
from pipeline.curation.config import Priority
from pipeline.curation.filters import Record, scores


def flattened(masks: list[Record], priority: Priority) -> list[Record]:
    """Each mask without the pixels that another has a better claim to, which may be all: then its area is 0.

    Area and box are those of what is left; scores, prompt and all else stay.

    Args:
        masks: Of one image.
        priority: "smallest": a pixel is the smallest mask's that has it; of equally large ones the better's.
            "best": that of the highest predicted IoU; of equal ones the smaller's. In both, what is still equal is
            decided for the first in the row.
    """
    if not masks:
        return []
    areas = np.array([mask["area"] for mask in masks], np.int64)
    worse = -np.nan_to_num(scores(masks, "predicted_iou"), nan=-np.inf)
    keys = (worse, areas) if priority == "smallest" else (areas, worse)  # the last one is the first to decide
    height, width = masks[0]["segmentation"]["size"]
    free = from_counts(np.array([0, height * width]), (height, width))
    left = list(masks)
    for i in np.lexsort((np.arange(len(masks)), *keys)).tolist():
        taken = intersection(masks[i]["segmentation"], free)
        left[i] = masks[i] | {"segmentation": taken, "area": rle.area(taken), "bbox": box_of(taken)}
        if left[i]["area"]:
            free = intersection(free, complement(taken))
    return left
