"""Candidates that were kept, curated at some thresholds, are the masks of a run at these thresholds."""

from typing import Any

import pytest
from curated_masks import WEIGHTS
from drawn_masks import coordinates_as_colours, ours

from pipeline.config import AmgConfig, MasksConfig
from pipeline.curation.config import StepsConfig
from pipeline.curation.curate import curate_masks
from pipeline.model.sam import THRESHOLDS

RGB = coordinates_as_colours(120, 200)
CURATED = {"parent_id", "depth"}


@pytest.mark.parametrize(
    ("choice", "grid"),
    [
        (THRESHOLDS | {"box_nms_thresh": 0.7}, {"points_per_side": 6}),
        ({"pred_iou_thresh": 0.9, "stability_score_thresh": 0.8, "box_nms_thresh": 0.4}, {"points_per_side": 6}),
        (
            THRESHOLDS | {"box_nms_thresh": 0.7, "crop_nms_thresh": 0.6, "min_mask_region_area": 40},
            {"points_per_side": 4, "crop_n_layers": 1, "crop_n_points_downscale_factor": 2},
        ),
    ],
)
def test_curated_candidates_are_the_direct_runs_masks(choice: dict[str, Any], grid: dict[str, Any]) -> None:
    candidates = ours(RGB, keep_candidates=True, **grid)
    direct = ours(RGB, **grid, **choice)
    curated = curate_masks(candidates, RGB.shape[:2], StepsConfig(**choice))
    assert [{name: mask[name] for name in mask.keys() - CURATED} for mask in curated] == direct
    assert 3 < len(direct) < len(candidates) / 2


def test_nothing_is_dropped_of_what_thresholds_and_suppression_would() -> None:
    everything = {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "box_nms_thresh": 1.0}
    candidates = ours(RGB, keep_candidates=True, points_per_side=4)
    assert len(candidates) == 3 * 4 * 4
    assert candidates == ours(RGB, points_per_side=4, **everything)
    bounded = ours(RGB, keep_candidates=True, points_per_side=4, pred_iou_thresh=0.89)
    assert bounded == [mask for mask in candidates if mask["predicted_iou"] > 0.89]


def test_a_fingerprint_knows_candidates_by_their_thresholds() -> None:
    settings = {"images": "in", "output": "out"}
    kept = MasksConfig(**settings, amg=AmgConfig(keep_candidates=True))
    loose = MasksConfig(
        **settings,
        amg=AmgConfig(pred_iou_thresh=0, stability_score_thresh=0, box_nms_thresh=1, crop_nms_thresh=1),
    )
    assert kept.amg.with_thresholds(THRESHOLDS) == kept.amg.with_thresholds(THRESHOLDS).with_thresholds({})
    assert kept.determinants(WEIGHTS) == loose.determinants(WEIGHTS)
    with pytest.raises(ValueError, match="min_mask_region_area"):
        AmgConfig(keep_candidates=True, min_mask_region_area=5)
