"""Curation's steps, each against the same done with whole pictures of pixels."""

import itertools

import numpy as np
import pytest
from curated_masks import pixels, record
from known_masks import blobs, box
from pydantic import ValidationError

from pipeline import rle
from pipeline.curation import arithmetic, duplicates, filters, hierarchy
from pipeline.curation.config import StepsConfig
from pipeline.curation.curate import curate_masks, curate_row
from pipeline.curation.flatten import flattened

HEIGHT, WIDTH = SIZE = (37, 53)


@pytest.fixture(scope="module")
def ragged() -> list[filters.Record]:
    """Masks that overlap in all ways, one empty, one everything, two the same, with equal scores among them."""
    masks = list(blobs(24, *SIZE))
    masks += [np.zeros(SIZE, bool), np.ones(SIZE, bool), masks[3], masks[4] & masks[5], masks[6] & masks[7]]
    scores = np.random.default_rng(1).choice([0.5, 0.88, 0.9, 0.95], len(masks))
    return [record(mask, score) for mask, score in zip(masks, scores, strict=True)]


def test_runs_are_those_of_the_pixels(ragged: list[filters.Record]) -> None:
    for mask in ragged:
        counts = rle.runs(mask["segmentation"]["counts"])
        assert counts.tolist() == rle.uncompressed(mask["segmentation"])["counts"]
        assert arithmetic.from_counts(counts, SIZE) == mask["segmentation"]
    long = np.zeros((2000, 1500), bool)
    long[3, 700:] = True  # runs of thousands, and differences of either sign
    long[1500:, 900] = True
    assert rle.runs(rle.encode(long)["counts"]).tolist() == rle.uncompressed(rle.encode(long))["counts"]


def test_set_arithmetic_is_that_of_the_pixels(ragged: list[filters.Record]) -> None:
    masks_NHW = pixels(ragged)
    rles = [mask["segmentation"] for mask in ragged]
    for mask_HW, encoded in zip(masks_NHW, rles, strict=True):
        assert (rle.decode(arithmetic.complement(encoded)) == ~mask_HW).all()
        x, y, width, height = arithmetic.box_of(encoded)
        rows, columns = np.nonzero(mask_HW)
        expected = [columns.min(), rows.min(), np.ptp(columns), np.ptp(rows)] if len(rows) else [0, 0, 0, 0]
        assert [x, y, width, height] == expected
        inside = mask_HW[y : y + height + 1, x : x + width + 1]
        assert (arithmetic.in_box(encoded, [x, y, width, height]) == inside).all()
    for (a_HW, a), (b_HW, b) in itertools.pairwise(zip(masks_NHW, rles, strict=True)):
        assert (rle.decode(arithmetic.intersection(a, b)) == a_HW & b_HW).all()
    assert (rle.decode(rle.union(rles[:3])) == masks_NHW[:3].any(0)).all()
    flat_NP = masks_NHW.reshape(len(rles), -1).astype(np.int64)
    assert (arithmetic.shared_areas(rles, rles[::2]) == flat_NP @ flat_NP[::2].T).all()


def test_arithmetic_takes_any_number_of_masks(ragged: list[filters.Record]) -> None:
    rles = [mask["segmentation"] for mask in ragged] * 20
    shared = arithmetic.shared_areas(rles, rles[:2])
    assert (shared == np.tile(arithmetic.shared_areas(rles[: len(ragged)], rles[:2]), (20, 1))).all()
    assert rle.area(rle.union(rles)) == HEIGHT * WIDTH
    assert len(duplicates.distinct_masks(ragged * 20, 0.99, 1.0)) < len(ragged) + 20


def test_thresholds_are_those_of_generation() -> None:
    values = np.array([[0.88, 0.95], [0.8800001, 0.9499999], [np.nan, np.nan]], np.float32).tolist()
    masks = [record(box(SIZE, 0, 0, 3, 3), iou, stability_score=stability) for iou, stability in values]
    assert filters.confident(masks, 0.88) == masks[1:2]
    assert filters.stable(masks, 0.95) == masks[:1]
    assert filters.confident(masks, 0) == filters.stable(masks, -1) == masks


def test_filters_of_shape_keep_what_their_rules_say() -> None:
    ring = box(SIZE, 10, 10, 30, 30) & ~box(SIZE, 15, 15, 25, 25)
    bay = box(SIZE, 10, 10, 30, 30) & ~box(SIZE, 15, 15, 25, 30)
    line = box(SIZE, 5, 5, 6, 15)
    corner = box(SIZE, 0, 0, 4, 4)
    masks = [record(mask) for mask in (ring, bay, line, corner, np.ones(SIZE, bool), np.zeros(SIZE, bool))]

    def kept(**steps: float) -> list[int]:
        left = [mask["segmentation"] for mask in curate_masks(masks, SIZE, StepsConfig(**steps))]
        return [i for i, mask in enumerate(masks) if mask["segmentation"] in left]

    assert kept() == [0, 1, 2, 3, 4, 5]
    assert kept(min_area=10, max_area=300) == [0, 1, 2, 3]
    assert kept(min_area=11) == [0, 1, 3, 4]
    assert kept(min_area_fraction=16 / HEIGHT / WIDTH, max_area_fraction=0.5) == [0, 1, 3]
    assert kept(max_aspect_ratio=9.9) == [0, 1, 3, 4, 5]
    assert kept(max_aspect_ratio=10) == [0, 1, 2, 3, 4, 5]
    assert kept(max_border_sides=0) == [0, 1, 2, 5]
    assert kept(max_border_sides=2) == [0, 1, 2, 3, 5]
    assert kept(max_hole_fraction=0.2) == [1, 2, 3, 4, 5]
    assert kept(max_hole_fraction=0.25) == [0, 1, 2, 3, 4, 5]
    assert filters.hole_fraction(masks[0]) == 0.25
    open_corner = box(SIZE, 10, 10, 20, 20) & ~box(SIZE, 11, 11, 19, 19)
    assert filters.hole_fraction(record(open_corner)) > 0
    open_corner[10, 10] = False
    assert filters.hole_fraction(record(open_corner)) == 0


def test_settings_that_leave_nothing_are_refused() -> None:
    with pytest.raises(ValidationError, match="max_area 3 is below"):
        StepsConfig(min_area=4, max_area=3)
    with pytest.raises(ValidationError, match="max_area_fraction"):
        StepsConfig(min_area_fraction=0.4, max_area_fraction=0.3)


@pytest.mark.parametrize(("mask_iou", "containment"), [(0.6, 1.0), (1.0, 0.75), (0.5, 0.9)])
def test_duplicates_are_those_of_the_pixels(
    ragged: list[filters.Record], mask_iou: float, containment: float
) -> None:
    masks_NHW = pixels(ragged)
    kept: list[int] = []
    for i in sorted(range(len(ragged)), key=lambda i: -ragged[i]["predicted_iou"]):
        shared = [int((masks_NHW[i] & masks_NHW[j]).sum()) for j in kept]
        unions = [int((masks_NHW[i] | masks_NHW[j]).sum()) for j in kept]
        area = ragged[i]["area"]
        overlaps = zip(shared, unions, strict=True)
        if not any(s > mask_iou * u or s > containment * area for s, u in overlaps):
            kept.append(i)
    found = duplicates.distinct_masks(ragged, mask_iou, containment)
    assert found == [ragged[i] for i in sorted(kept)]
    assert 1 < len(found) < len(ragged)


def test_boxes_that_agree_do_not_make_masks_duplicates() -> None:
    """Two crossing diagonals have one box and hardly a pixel in common."""
    diagonal = np.eye(*SIZE, dtype=bool) | np.eye(*SIZE, k=1, dtype=bool)
    masks = [record(diagonal), record(diagonal[:, ::-1])]
    assert duplicates.distinct_masks(masks, 0.1, 0.1) == masks


def test_parents_are_the_smallest_masks_around() -> None:
    whole, part = box(SIZE, 0, 0, 30, 30), box(SIZE, 5, 5, 25, 25)
    speck, beside = box(SIZE, 9, 9, 12, 12), box(SIZE, 20, 20, 36, 36)
    masks = [record(mask) for mask in (speck, whole, beside, part, whole, np.zeros(SIZE, bool))]
    found = hierarchy.with_parents(masks, 0.9)
    assert [mask["parent_id"] for mask in found] == [3, None, None, 4, 1, None]
    assert [mask["depth"] for mask in found] == [3, 0, 0, 2, 1, 0]
    assert hierarchy.with_parents(masks, 100 / 256)[2]["parent_id"] == 4


def test_a_parent_that_goes_leaves_its_children_to_its_own() -> None:
    masks = [record(box(SIZE, 0, 0, size, size)) for size in (30, 20, 10, 5)]
    found = hierarchy.with_parents(masks, 1.0)
    assert [mask["parent_id"] for mask in found] == [None, 0, 1, 2]
    found[1]["area"] = found[2]["area"] = 0
    left = hierarchy.without_empty(found)
    assert [(mask["area"], mask["parent_id"], mask["depth"]) for mask in left] == [(900, None, 0), (25, 0, 1)]


@pytest.mark.parametrize("priority", ["smallest", "best"])
def test_flattened_masks_are_those_painted_worst_first(ragged: list[filters.Record], priority: str) -> None:
    masks_NHW = pixels(ragged)

    def claim(i: int) -> tuple[float, float, int]:
        area, worse = ragged[i]["area"], -ragged[i]["predicted_iou"]
        return (area, worse, i) if priority == "smallest" else (worse, area, i)

    labels_HW = np.full(SIZE, -1)
    for i in sorted(range(len(ragged)), key=claim, reverse=True):
        labels_HW[masks_NHW[i]] = i
    found = flattened(ragged, StepsConfig(flatten=priority).flatten or "best")
    for i, mask in enumerate(found):
        expected_HW = labels_HW == i
        assert (rle.decode(mask["segmentation"]) == expected_HW).all()
        again = record(expected_HW)
        assert (mask["area"], mask["bbox"]) == (again["area"], again["bbox"])
        assert mask["predicted_iou"] == ragged[i]["predicted_iou"]


def test_a_row_says_what_its_masks_leave_uncovered(ragged: list[filters.Record]) -> None:
    row = {"status": "ok", "error": None, "height": HEIGHT, "width": WIDTH, "masks": ragged[:3]}
    curated = curate_row(row, StepsConfig(flatten="smallest", hierarchy_thresh=0.9))
    covered = pixels(ragged[:3]).any(0).sum()
    assert curated["uncovered_area"] == HEIGHT * WIDTH - covered == HEIGHT * WIDTH - pixels(curated["masks"]).sum()
    assert curated["coverage"] == covered / (HEIGHT * WIDTH)
    nothing = curate_row(row, StepsConfig(min_area=HEIGHT * WIDTH + 1))
    assert (nothing["status"], nothing["masks"], nothing["coverage"]) == ("empty", [], 0.0)
    failed = {"status": "truncated", "error": "cut", "height": None, "width": None, "masks": []}
    assert curate_row(failed, StepsConfig(flatten="best")) == failed | {"coverage": None, "uncovered_area": None}


def test_no_step_is_taken_that_was_not_asked_for(ragged: list[filters.Record]) -> None:
    assert curate_masks(ragged, SIZE, StepsConfig()) == [
        mask | {"parent_id": None, "depth": None} for mask in ragged
    ]
