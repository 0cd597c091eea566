"""What drops a candidate: pure functions from `Candidates` to fewer `Candidates`."""

import torch
from segment_anything.utils.amg import is_box_near_crop_edge
from torchvision.ops import batched_nms

from pipeline.amg.candidates import Candidates


def stable(candidates: Candidates, threshold: float) -> Candidates:
    """Those whose stability score is at least `threshold`; all of them if that is 0 or less."""
    if threshold <= 0:
        return candidates
    return candidates.select(candidates.stability_score_N >= threshold)


def whole(candidates: Candidates, crop_box_xyxy: list[int], image_size: tuple[int, int]) -> Candidates:
    """Those that the crop does not cut: no edge within 20 pixels of a crop's edge inside the image."""
    height, width = image_size
    cut = is_box_near_crop_edge(candidates.boxes_N4_xyxy, crop_box_xyxy, [0, 0, width, height])
    return candidates.select(~cut)


def nms(boxes_N4_xyxy: torch.Tensor, scores_N: torch.Tensor, box_iou: float) -> torch.Tensor:
    """Indices that stay, best score first; a box goes if it overlaps a better one by more than `box_iou`."""
    one_class = torch.zeros_like(boxes_N4_xyxy[:, 0])
    keep: torch.Tensor = batched_nms(boxes_N4_xyxy.float(), scores_N, one_class, box_iou)
    return keep


def nms_across_crops(boxes_N4_xyxy: torch.Tensor, crops_N4_xyxy: torch.Tensor, box_iou: float) -> torch.Tensor:
    """Indices of what stays of several crops' masks; of duplicates that of the smaller crop does."""
    left_N, top_N, right_N, bottom_N = crops_N4_xyxy.T
    return nms(boxes_N4_xyxy, 1 / ((right_N - left_N) * (bottom_N - top_N)), box_iou)
