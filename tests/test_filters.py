"""What drops a candidate."""

from dataclasses import replace
from itertools import pairwise

import torch
from drawn_masks import ALL, coordinates_as_colours, ours

from pipeline.amg import filters
from pipeline.amg.candidates import Candidates


def candidates(boxes: list[list[int]], ious: list[float]) -> Candidates:
    count = len(boxes)
    return Candidates(
        torch.zeros(count, 4, 4),
        torch.tensor(ious),
        torch.arange(count),
        torch.linspace(0.5, 1, count),
        torch.tensor(boxes).view(-1, 4),
    )


def test_suppression_keeps_the_best_of_overlapping_boxes() -> None:
    """Box IoU of the first two is 0.81, of the first and third 0.5."""
    boxes = torch.tensor([[0, 0, 90, 90], [0, 0, 100, 81], [0, 0, 50, 81], [200, 200, 210, 210]])
    scores = torch.tensor([0.8, 0.9, 0.7, 0.95])
    assert filters.nms(boxes, scores, 0.7).tolist() == [3, 1, 2]
    assert filters.nms(boxes, scores, 0.3).tolist() == [3, 1]
    assert filters.nms(boxes, scores, 1.0).tolist() == [3, 1, 0, 2]
    assert len(filters.nms(boxes[:0], scores[:0], 0.7)) == 0


def test_masks_cut_by_a_crop_are_dropped_but_not_those_at_the_images_edge() -> None:
    boxes = [[0, 0, 30, 30], [60, 30, 99, 59], [60, 30, 79, 59], [30, 0, 40, 79], [30, 0, 40, 59]]
    some = candidates(boxes, [0.5] * 5)
    kept = filters.whole(some, [0, 0, 100, 80], (200, 300))  # crop at the image's upper left corner
    assert kept.prompts_N.tolist() == [0, 2, 4]
    assert len(filters.whole(some, [0, 0, 100, 80], (80, 100))) == 5


def test_stability_threshold_is_inclusive_and_zero_keeps_what_has_none() -> None:
    some = candidates([[0, 0, 1, 1]] * 3, [0.5] * 3)
    some = replace(some, stability_score_N=torch.tensor([0.95, torch.nan, 0.9]))
    assert filters.stable(some, float(torch.tensor(0.95))).prompts_N.tolist() == [0]
    assert len(filters.stable(some, 0.0)) == 3


def test_best_predicted_iou_comes_first() -> None:
    masks = ours(coordinates_as_colours(120, 200), **ALL)
    assert len(masks) > 10
    assert all(a["predicted_iou"] >= b["predicted_iou"] for a, b in pairwise(masks))
