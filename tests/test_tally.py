"""The report's numbers: against the rows themselves, in whatever parts they are counted."""

import itertools
import math
import random
from functools import partial, reduce
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pycocotools import mask as coco

from pipeline import rle
from pipeline.report.histogram import Bar, Histogram
from pipeline.report.tally import Sampling, Tally, tally_rows, tally_shard
from schemas.masks import MASKS_SCHEMA

SAMPLING = Sampling(seed=0, sampled=5, outliers=3)
HEIGHT, WIDTH = 30, 40


def a_row(image_id: int, masks: int) -> dict[str, Any]:
    """An image with so many rectangles, which overlap; every seventh image failed."""
    rng = np.random.default_rng(image_id)
    row = {"image_id": image_id, "uri": f"s3://b/{image_id}.jpg", "status": "ok", "error": None}
    if image_id % 7 == 6:
        return row | {"status": "truncated", "error": f"cut {image_id}", "masks": []}
    pixels = np.zeros((masks, HEIGHT, WIDTH), np.bool_)
    for mask_HW in pixels:
        top, left = rng.integers(HEIGHT - 5), rng.integers(WIDTH - 5)
        mask_HW[top : top + rng.integers(1, 20), left : left + rng.integers(1, 30)] = True
    row |= {"status": "ok" if masks else "empty", "height": HEIGHT, "width": WIDTH}
    return row | {
        "masks": [
            {
                "segmentation": rle.encode(mask_HW),
                "area": int(mask_HW.sum()),
                "bbox": [0, 0, 1, 1],
                "predicted_iou": float(rng.uniform(0.8, 1.05)),
                "point_coords": [[1.0, 2.0]],
                "stability_score": math.nan if image_id == 3 else float(rng.uniform(0.5, 1)),
                "crop_box": [0, 0, WIDTH, HEIGHT],
            }
            for mask_HW in pixels
        ]
    }


ROWS = [a_row(image_id, image_id % 5) for image_id in range(40)]
PROCESSED = [row for row in ROWS if row["status"] in {"ok", "empty"}]


def tally_of(rows: list[dict[str, Any]], sampling: Sampling = SAMPLING) -> Tally:
    return tally_rows(pa.Table.from_pylist(rows, MASKS_SCHEMA), sampling)


def added(tallies: list[Tally]) -> Tally:
    return reduce(lambda one, two: one.plus(two, SAMPLING), tallies, Tally())


def test_counts_and_histograms_are_the_rows() -> None:
    tally = tally_of(ROWS)
    masks = [mask for row in ROWS for mask in row["masks"]]
    assert tally.images == 40
    assert tally.statuses == {"ok": 28, "empty": 7, "truncated": 5}
    assert tally.masks == len(masks) == tally.histograms["predicted_iou"].count
    assert tally.histograms["masks"].counts_B[:6].tolist() == [7, 7, 7, 7, 7, 0]
    assert tally.histograms["predicted_iou"].mean == pytest.approx(np.mean([m["predicted_iou"] for m in masks]))
    stable = [mask["stability_score"] for mask in masks if not math.isnan(mask["stability_score"])]
    assert tally.histograms["stability_score"].count == len(stable) == len(masks) - 3
    shares = np.log10([mask["area"] / (HEIGHT * WIDTH) for mask in masks])
    assert tally.histograms["area"].mean == pytest.approx(shares.mean())
    covered = [
        np.any([coco.decode(mask["segmentation"]) for mask in row["masks"]], axis=0).mean() if row["masks"] else 0
        for row in PROCESSED
    ]
    assert tally.histograms["coverage"].mean == pytest.approx(np.mean(covered))


def test_outliers_and_failures_are_the_right_images() -> None:
    tally = tally_of(ROWS)
    by_masks = sorted(PROCESSED, key=lambda row: (-len(row["masks"]), row["image_id"]))
    assert [image.image_id for image in tally.most] == [row["image_id"] for row in by_masks[:3]]
    assert {image.image_id % 5 for image in tally.empty} == {0}
    assert tally.unstable[0].image_id == 3  # no number is the least stable
    with_masks = [row for row in PROCESSED if row["masks"] and row["image_id"] != 3]
    least = min(with_masks, key=lambda row: np.mean([mask["stability_score"] for mask in row["masks"]]))
    assert tally.unstable[1].image_id == least["image_id"]
    assert [failure.error for failure in tally.failures["truncated"]] == [f"cut {i}" for i in (6, 13, 20, 27, 34)]


def test_any_parts_in_any_order_give_the_same() -> None:
    whole = tally_of(ROWS)
    parts = [ROWS[start : start + 3] for start in range(0, 40, 3)]
    random.Random(1).shuffle(parts)
    again = added([tally_of(part) for part in parts])
    for name in ("statuses", "masks", "sample", "most", "empty", "unstable", "failures"):
        assert getattr(again, name) == getattr(whole, name), name
    for name, histogram in whole.histograms.items():
        np.testing.assert_array_equal(again.histograms[name].counts_B, histogram.counts_B, err_msg=name)


def test_a_sample_follows_from_its_seed_and_is_fair() -> None:
    samples = [tally_of(ROWS, Sampling(seed, 5, 1)).sample for seed in range(200)]
    assert samples[0] == tally_of(ROWS, Sampling(0, 5, 1)).sample
    drawn = np.bincount([image.image_id for sample in samples for image in sample], minlength=40)
    processed = [row["image_id"] for row in PROCESSED]
    assert drawn.sum() == 200 * 5 == drawn[processed].sum()
    assert 10 <= drawn[processed].min() <= drawn[processed].max() <= 50  # 29 are expected


def test_a_tally_does_not_grow() -> None:
    def size(tally: Tally) -> int:
        return sum(
            len(part) for part in (tally.sample, tally.most, tally.empty, tally.unstable, tally.faults)
        ) + sum(map(len, tally.failures.values()))

    once = added([tally_of(ROWS)])
    often = added([tally_of(ROWS)] * 30 + [Tally(faults=("a",), unread=1)] * 50)
    assert size(often) <= size(once) + 20
    assert often.unread == 50


def test_a_shard_that_cannot_be_read_is_named_and_left_out(tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks/part-00000.parquet").write_bytes(b"PAR1 damaged")
    tally = tally_shard(tmp_path.as_uri(), "f", SAMPLING, 0)
    assert (tally.images, tally.unread) == (0, 1)
    assert tally.faults[0].startswith("masks/part-00000.parquet: ")


def test_bars_cover_what_is_occupied_with_few_bars() -> None:
    histogram = Histogram.empty(0, 1, 200).with_values(np.array([0.301, 0.305, 0.9, math.nan, math.inf]))
    bars = histogram.bars(most=10)
    assert sum(bar.count for bar in bars) == histogram.count == 3
    assert len(bars) <= 10
    assert bars[0] == Bar(pytest.approx(0.3), pytest.approx(0.4), 2)
    assert bars[-1].count == 1
    assert all(one.high == two.low for one, two in itertools.pairwise(bars))
    assert Histogram.empty(0, 1, 200).bars() == []


def test_values_beyond_the_ends_count_in_the_last_bins() -> None:
    histogram = Histogram.empty(0, 10, 10).with_values(np.array([-5, 0.0, 3.0, 10.0, 99.0]))
    assert histogram.counts_B.tolist() == [2, 0, 0, 1, 0, 0, 0, 0, 0, 2]
    assert histogram.median == 3


def test_edges_belong_to_the_bin_above() -> None:
    """Though 0.29 / 0.005 is a little less than 58 in floating point."""
    place = partial(Histogram.empty(0, 1, 200).with_values)
    for edge in range(200):
        assert place(np.array([edge * 0.005])).counts_B[edge] == 1, edge
