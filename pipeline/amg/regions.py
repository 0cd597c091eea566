"""Removing specks: small islands and small holes in masks."""

from dataclasses import replace

import numpy as np
import torch
from segment_anything.utils.amg import batched_mask_to_box, remove_small_regions

from pipeline import rle
from pipeline.amg import filters
from pipeline.amg.mask import Mask
from pipeline.rle import Rle


def without_small_regions(masks: list[Mask], min_area: int, box_iou: float) -> list[Mask]:
    """Fill holes and remove islands of fewer than `min_area` pixels (8-connected).

    As in the reference: area and box are those of the cleaned mask, scores stay; masks that have become
    duplicates are dropped, an unchanged mask is preferred to a changed one, and the order is that of the
    suppression.
    """
    if not masks:
        return masks
    cleaned = [_clean(mask, min_area) for mask in masks]
    boxes = torch.tensor([mask.box_xyxy for mask in cleaned])
    unchanged = [float(after is before) for after, before in zip(cleaned, masks, strict=True)]
    return [cleaned[i] for i in filters.nms(boxes, torch.tensor(unchanged), box_iou).tolist()]


def _clean(mask: Mask, min_area: int) -> Mask:
    cleaned = clean(mask.segmentation, min_area)
    return mask if cleaned is None else replace(mask, segmentation=cleaned[0], box_xyxy=cleaned[1])


def clean(segmentation: Rle, min_area: int) -> tuple[Rle, list[int]] | None:
    """A mask without its small holes and islands, and its box; None where there are none."""
    pixels = rle.decode(segmentation)
    pixels, filled = remove_small_regions(pixels, min_area, mode="holes")
    pixels, removed = remove_small_regions(pixels, min_area, mode="islands")
    if not (filled or removed):
        return None
    box = batched_mask_to_box(torch.from_numpy(np.ascontiguousarray(pixels))[None])[0]
    return rle.encode(pixels), box.tolist()
