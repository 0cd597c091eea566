"""The funnel: every confident mask is kept, or counted once by what dropped it."""

import json
from pathlib import Path
from typing import Any, cast

import pytest
from drawn_dataset import drawn_dataset
from drawn_masks import ALL, DrawnModel, coordinates_as_colours, ours
from running import rows, write_jpegs

from pipeline import reconcile
from pipeline.amg import MaskGenerator
from pipeline.amg.funnel import Funnel
from pipeline.model.sam import SamModel
from pipeline.shard import ShardSummary, read_footer
from pipeline.storage import canonical_uri

RGB = coordinates_as_colours(120, 200)


def funnel(**arguments: Any) -> tuple[int, Funnel]:
    """How many masks stay of the drawn ones, and the funnel."""
    generator = MaskGenerator(cast(SamModel, DrawnModel()), **{**ALL, **arguments})
    masks, counted = generator.generate_with_funnel(RGB)
    return len(masks), counted


def test_a_candidate_is_each_of_the_three_masks_of_a_prompt() -> None:
    assert funnel() == (75, Funnel(candidates=75, confident=75))
    _, counted = funnel(crop_n_layers=1)
    assert counted.candidates == 5 * 75


def test_each_filter_counts_what_it_drops() -> None:
    """One filter at a time, against what the masks themselves say."""
    everything = ours(RGB, **ALL)
    confident = sum(mask["predicted_iou"] > 0.88 for mask in everything)
    unstable = sum(not mask["stability_score"] >= 0.9 for mask in everything)
    assert 0 < confident < 75
    assert 0 < unstable < 75
    assert funnel(pred_iou_thresh=0.88) == (confident, Funnel(candidates=75, confident=confident))
    assert funnel(stability_score_thresh=0.9)[1] == Funnel(candidates=75, confident=75, unstable=unstable)
    kept, counted = funnel(box_nms_thresh=0.5)
    assert counted == Funnel(candidates=75, confident=75, duplicates=75 - kept)
    assert kept < 75
    kept, counted = funnel(crop_n_layers=1)
    assert counted == Funnel(candidates=375, confident=375, cut=375 - kept)
    assert kept < 375


@pytest.mark.parametrize(
    "arguments",
    [
        {"pred_iou_thresh": 0.87, "stability_score_thresh": 0.8, "box_nms_thresh": 0.3},
        {"stability_score_thresh": 0.5, "box_nms_thresh": 0.7, "crop_n_layers": 1, "crop_nms_thresh": 0.4},
        {"box_nms_thresh": 0.7, "min_mask_region_area": 200},
    ],
)
def test_what_is_not_dropped_is_what_stays(arguments: dict[str, Any]) -> None:
    kept, counted = funnel(**arguments)
    assert 0 < kept < counted.confident
    assert kept == counted.confident - counted.unstable - counted.cut - counted.duplicates


def test_footers_and_summary_hold_the_sum(tmp_path: Path) -> None:
    images = write_jpegs(tmp_path / "in", 5)
    (images / "bad.jpg").write_bytes(b"no image")
    drawn_dataset(images, tmp_path / "out", images_per_shard=4)
    output = canonical_uri(str(tmp_path / "out"))
    of_shards = [read_footer(output, "masks", shard)[1].funnel for shard in range(2)]
    total = json.loads((tmp_path / "out/summary.json").read_text())["funnel"]
    assert total == {name: sum(shard[name] for shard in of_shards if shard) for name in total}
    assert total["candidates"] == 5 * 48
    masks = sum(len(row["masks"]) for row in rows(tmp_path / "out"))
    assert masks == total["confident"] - total["unstable"] - total["cut"] - total["duplicates"]


def test_a_footer_without_it_is_read_and_says_that_nothing_is_known() -> None:
    old = ShardSummary.from_json(
        '{"shard": 0, "images": 1, "masks": 2, "statuses": {"ok": 1}, "bytes": 3, "seconds": 4}'
    )
    new = ShardSummary(1, 1, 2, {"ok": 1}, 3, 4.0, {"confident": 5})
    assert old.funnel is None
    assert reconcile.funnel_of([new]) == {"confident": 5}
    assert reconcile.funnel_of([new, old]) is None
