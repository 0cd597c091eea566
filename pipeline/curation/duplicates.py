"""What drops a mask for the sake of another: by box, as the reference does, and by the masks themselves."""

import itertools

import numpy as np
import torch

from pipeline import rle
from pipeline.amg import filters, regions
from pipeline.curation.arithmetic import shared_areas
from pipeline.curation.filters import Record, scores


def distinct_boxes(masks: list[Record], box_iou: float) -> list[Record]:
    """Non-maximum suppression by box within each crop, as when masks are generated.

    Crops come in the order of their first mask; of a crop's, the one of the highest predicted IoU comes first.
    """
    crops = list(dict.fromkeys(tuple(mask["crop_box"]) for mask in masks))
    return list(
        itertools.chain.from_iterable(
            _distinct([mask for mask in masks if tuple(mask["crop_box"]) == crop], box_iou) for crop in crops
        )
    )


def distinct_crops(masks: list[Record], box_iou: float) -> list[Record]:
    """Drop duplicates by box that were found in several crops; the smaller crop's mask stays."""
    if not masks:
        return masks
    keep = filters.nms_across_crops(_boxes(masks, "bbox"), _boxes(masks, "crop_box"), box_iou)
    return [masks[i] for i in keep.tolist()]


def without_small_regions(masks: list[Record], min_area: int, box_iou: float) -> list[Record]:
    """What `pipeline.amg.regions.without_small_regions` does, which has the rules, with records."""
    if not masks:
        return masks
    cleaned = [_clean(mask, min_area) for mask in masks]
    unchanged = [float(after is before) for after, before in zip(cleaned, masks, strict=True)]
    keep = filters.nms(_boxes(cleaned, "bbox"), torch.tensor(unchanged), box_iou)
    return [cleaned[i] for i in keep.tolist()]


def distinct_masks(masks: list[Record], mask_iou: float, containment: float) -> list[Record]:
    """Suppression by the masks' own pixels, best predicted IoU first, of equal ones the first in the row.

    A mask goes if a better one that stays has a mask IoU with it above `mask_iou`, or holds more than the share
    `containment` of it; 1 turns either off. Those that stay keep their order. An empty mask is no one's duplicate.
    """
    areas = np.array([mask["area"] for mask in masks], np.int64)
    left = np.argsort(-np.nan_to_num(scores(masks, "predicted_iou"), nan=-np.inf), kind="stable")
    kept: list[int] = []
    while len(left):
        best, left = int(left[0]), left[1:]
        kept.append(best)
        shared = shared_areas([masks[i]["segmentation"] for i in left], [masks[best]["segmentation"]])[:, 0]
        union = areas[left] + areas[best] - shared
        left = left[(shared <= mask_iou * union) & (shared <= containment * areas[left])]
    return [masks[i] for i in sorted(kept)]


def _distinct(masks: list[Record], box_iou: float) -> list[Record]:
    keep = filters.nms(_boxes(masks, "bbox"), torch.from_numpy(scores(masks, "predicted_iou")), box_iou)
    return [masks[i] for i in keep.tolist()]


def _boxes(masks: list[Record], name: str) -> torch.Tensor:
    """N x 4, left, top, right and bottom."""
    boxes = torch.tensor([mask[name] for mask in masks])
    return torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)


def _clean(mask: Record, min_area: int) -> Record:
    cleaned = regions.clean(mask["segmentation"], min_area)
    if cleaned is None:
        return mask
    segmentation, (left, top, right, bottom) = cleaned
    box = [left, top, right - left, bottom - top]
    return mask | {"segmentation": segmentation, "area": rle.area(segmentation), "bbox": box}
