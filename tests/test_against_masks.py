"""Models against what people marked: one click a segment, and all masks of a picture."""

from typing import Any

import numpy as np
import pytest
from known_masks import KEEP_ALL, blobs, box
from seeded import PHOTOGRAPHS, lively_state_dict, model_with

from pipeline import rle
from pipeline.amg import MaskGenerator
from pipeline.evaluation import against_masks, metrics, prompting
from pipeline.evaluation.against_masks import ProposalScores
from pipeline.evaluation.pictures import Picture
from pipeline.evaluation.prompting import Answers
from pipeline.evaluation.report import masks_table


def test_one_click_is_told_for_the_best_mask_and_for_the_chosen_one() -> None:
    wanted = np.stack([box((20, 20), 5, 5, 15, 15)])
    shifted, empty = box((20, 20), 5, 6, 15, 16), np.zeros((20, 20), bool)
    answers = Answers(np.stack([empty, shifted, empty])[None], np.array([[0.2, 0.1, 0.3]]))
    scores = against_masks.click_scores(answers, wanted)
    assert scores.best_N.tolist() == pytest.approx([90 / 110])
    assert scores.chosen_N.tolist() == [0]
    assert scores.boundary_N.tolist() == pytest.approx([18 / 54])


def test_perfect_masks_have_recall_1() -> None:
    masks = np.stack([box((20, 30), 0, 0, 20, 10), box((20, 30), 0, 10, 20, 30)])
    segments = against_masks.segments_of(Picture("", np.zeros((20, 30, 3), np.uint8), (masks, masks[:1])))
    found = [rle.encode(mask) for mask in masks]
    assert against_masks.proposal_scores(found, segments) == ProposalScores(1.0, 2, 1.0)


def test_recall_is_averaged_over_people() -> None:
    thirds = np.stack([box((20, 30), 0, 10 * i, 20, 10 * i + 10) for i in range(3)])
    people = (thirds, np.stack([box((20, 30), 0, 20, 20, 30)]))
    segments = against_masks.segments_of(Picture("", np.zeros((20, 30, 3), np.uint8), people))
    assert segments.people_N.tolist() == [0, 0, 0, 1]
    assert segments.points_N2.tolist() == [[4, 4], [14, 4], [24, 4], [24, 4]]
    scores = against_masks.proposal_scores([rle.encode(thirds[0])], segments)
    assert scores.average_recall == pytest.approx((1 / 3 + 0) / 2)
    assert scores.coverage == pytest.approx(1 / 3)


def test_only_the_best_thousand_masks_count() -> None:
    mask = box((20, 30), 0, 0, 20, 10)
    segments = against_masks.segments_of(Picture("", np.zeros((20, 30, 3), np.uint8), (mask[None],)))
    others = [rle.encode(~mask)] * 1000
    assert against_masks.proposal_scores([*others[1:], rle.encode(mask)], segments).average_recall == 1
    assert against_masks.proposal_scores([*others, rle.encode(mask)], segments).average_recall == 0


def test_a_picture_that_nobody_marked_counts_for_masks_only() -> None:
    pictures = [Picture("", PHOTOGRAPHS["small"]()), Picture("", PHOTOGRAPHS["small"](), (blobs(2, 150, 226),))]
    model = model_with(lively_state_dict(), 64)
    scores = against_masks.measure({"model": model}, pictures, KEEP_ALL, with_felzenszwalb=True)
    assert [len(picture.clicks.best_N) for picture in scores["model"]] == [0, 2]
    assert np.isnan(scores["model"][0].proposals.average_recall)
    assert scores["model"][0].proposals.masks == 48
    [row, *_] = masks_table("", scores).rows
    assert row[1:3] == (2, 2)
    assert row[6] == scores["model"][1].proposals.average_recall


def test_a_model_finds_its_own_masks() -> None:
    rgb, model = PHOTOGRAPHS["coffee"](), model_with(lively_state_dict(), 128)
    found = MaskGenerator(model, **dict(KEEP_ALL)).generate(rgb)
    masks = np.stack([rle.decode(mask["segmentation"]) for mask in found])
    kept = masks[(masks.mean(axis=(1, 2)) > 0.05)]
    scores = against_masks.measure(
        {"model": model}, [Picture("", rgb, (kept,))], KEEP_ALL, with_felzenszwalb=False
    )["model"][0]
    assert scores.proposals.average_recall == 1
    assert scores.proposals.masks == len(found)
    points = [prompting.farthest_from_border(mask) for mask in kept]
    answers = prompting.answer(model, model.encode(rgb), np.array(points, float)[:, None], KEEP_ALL)
    ious = metrics.mask_iou(answers.masks_N3HW, kept[:, None])
    np.testing.assert_allclose(scores.clicks.best_N, ious.max(axis=1), atol=1e-3)
    assert (scores.clicks.chosen_N <= scores.clicks.best_N).all()
    assert (scores.clicks.chosen_N < scores.clicks.best_N).any()


def test_an_embedding_made_before_gives_the_same_masks() -> None:
    rgb, model = PHOTOGRAPHS["small"](), model_with(lively_state_dict(), 64)

    def without_nan(masks: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [mask | {"stability_score": np.nan_to_num(mask["stability_score"])} for mask in masks]

    for layers in (0, 1):
        generator = MaskGenerator(model, **dict(KEEP_ALL, points_per_side=2, crop_n_layers=layers))
        given, another = (generator.generate(rgb, model.encode(seen)) for seen in (rgb, rgb[::-1]))
        assert without_nan(given) == without_nan(generator.generate(rgb))
        assert without_nan(given) != without_nan(another)
