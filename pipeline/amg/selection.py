"""The masks of one crop that stay: stable, not cut by the crop, no duplicates.

Stability and box are found at full size, which costs more than all else that is done with a mask. So masks are
taken best predicted IoU first, some at a time, and those after them that surely overlap a mask that stays, as the
bounds of their boxes tell, go unmeasured. What stays is what non-maximum suppression leaves of all.
"""

from typing import Final, NamedTuple

import torch

from pipeline.amg import filters
from pipeline.amg.bounds import Bounds, surely_overlap
from pipeline.amg.candidates import Candidates, Found, concatenate
from pipeline.amg.funnel import Funnel
from pipeline.amg.measure import measure
from pipeline.config import AmgConfig
from pipeline.model.sam import Embedding

_AT_ONCE: Final = 32  # fewer make more passes, more are measured in vain


class Crop(NamedTuple):
    """Where masks were found."""

    embedding: Embedding
    box_xyxy: list[int]
    """In the image."""
    of_image: tuple[int, int]
    """Height and width."""


class Selected(NamedTuple):
    """The masks of a crop that stay, and why the others went."""

    candidates: Candidates
    """Best predicted IoU first; of equal ones the first found first."""
    dropped: Funnel
    """`unstable`, `cut` and `duplicates`; the others are 0."""


def select(found: list[Found], crop: Crop, image_size: int, config: AmgConfig) -> Selected:
    """The masks that stay.

    Args:
        found: Confident masks of a crop, in parts; at least one part.
        crop: That crop.
        image_size: The model's, in pixels.
        config: Offset and threshold of the stability score, box IoU above which masks are duplicates.
    """
    # The logits are most of the memory, and stay where they are.
    logits = [mask_SS for part in found for mask_SS in part.logits_NSS]
    predicted_iou_N = torch.cat([part.predicted_iou_N for part in found])
    prompts_N = torch.cat([part.prompts_N for part in found])
    bounds = Bounds(*(torch.cat(boxes) for boxes in zip(*(part.bounds for part in found), strict=True)))
    left_N = torch.sort(predicted_iou_N, descending=True, stable=True).indices
    kept: list[Candidates] = []
    unstable = cut = 0
    while len(left_N) or not kept:
        few_n, left_N = left_N[:_AT_ONCE], left_N[_AT_ONCE:]
        few_logits = [logits[i] for i in few_n.tolist()]
        logits_nSS = torch.stack(few_logits) if few_logits else found[0].logits_NSS[:0]
        measured = measure(logits_nSS, crop.embedding, image_size, config.stability_score_offset)
        candidates = Candidates(logits_nSS, predicted_iou_N[few_n], prompts_N[few_n], *measured)
        stable = filters.stable(candidates, config.stability_score_thresh or 0)
        whole = filters.whole(stable, crop.box_xyxy, crop.of_image)
        unstable, cut = unstable + len(candidates) - len(stable), cut + len(stable) - len(whole)
        candidates = _distinct(whole, kept, config.box_nms_thresh)
        kept.append(candidates)
        others = Bounds(*(boxes_N4[left_N] for boxes_N4 in bounds))
        left_N = left_N[~surely_overlap(candidates.boxes_N4_xyxy, others, config.box_nms_thresh)]
    all_kept = concatenate(kept)
    duplicates = len(predicted_iou_N) - unstable - cut - len(all_kept)
    return Selected(all_kept, Funnel(unstable=unstable, cut=cut, duplicates=duplicates))


def _distinct(candidates: Candidates, kept: list[Candidates], box_iou: float) -> Candidates:
    """Candidates that neither a better one nor one that was kept makes a duplicate; all kept ones are better."""
    boxes = torch.cat([part.boxes_N4_xyxy for part in (*kept, candidates)])
    scores = torch.cat([part.predicted_iou_N for part in (*kept, candidates)])
    before = len(boxes) - len(candidates)
    keep = filters.nms(boxes, scores, box_iou) - before
    return candidates.select(keep[keep >= 0])
