"""The metrics on masks whose values are known, and the measurements on models whose answers are."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import torch
from bsds_folder import write_bsds
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from seeded import PHOTOGRAPHS, SamPredictor, grid, lively_state_dict, model_with, reference_with

from pipeline.amg import MaskGenerator, rle
from pipeline.config import AmgConfig
from pipeline.evaluation import against_masks, against_teacher, felzenszwalb, metrics, prompting
from pipeline.evaluation.against_masks import ProposalScores
from pipeline.evaluation.against_teacher import Agreement, EmbeddingScores, StudentScores
from pipeline.evaluation.pictures import Picture, bsds_pictures, scene_pictures
from pipeline.evaluation.prompting import Answers
from pipeline.evaluation.report import as_markdown, masks_table, teacher_tables
from pipeline.model.sam import Embedding
from pipeline.model.weights import seeded_model
from pipeline.training import scenes

Mask = NDArray[np.bool_]
KEEP_ALL = AmgConfig(points_per_side=4, pred_iou_thresh=-10, stability_score_thresh=0, box_nms_thresh=1.0)


def box(size: tuple[int, int], top: int, left: int, bottom: int, right: int) -> Mask:
    mask = np.zeros(size, bool)
    mask[top:bottom, left:right] = True
    return mask


def blobs(count: int, height: int, width: int, seed: int = 0) -> Mask:
    """Masks with ragged contours, holes and islands, some at the picture's edge; each has a pixel."""
    noise = np.random.default_rng(seed).normal(size=(count, height, width))
    masks: Mask = scipy.ndimage.gaussian_filter(noise, (0, 4, 4)) > 0
    return masks


def test_iou_counts_pixels() -> None:
    a, b = box((4, 5), 0, 0, 2, 2), box((4, 5), 0, 1, 2, 3)
    assert metrics.mask_iou(a, b) == pytest.approx(2 / 6)
    assert metrics.mask_iou(a, a) == 1
    assert metrics.mask_iou(a, ~a) == 0


def test_two_empty_masks_are_the_same() -> None:
    empty, full = np.zeros((2, 3), bool), np.ones((2, 3), bool)
    assert metrics.mask_iou(empty, empty) == 1
    assert metrics.mask_iou(empty, full) == 0
    assert metrics.boundary_iou(empty, empty) == 1


def test_iou_of_many_is_that_of_each() -> None:
    a, b = blobs(6, 20, 30).reshape(2, 3, 20, 30), blobs(2, 20, 30, seed=1)
    ious = metrics.mask_iou(a, b[:, None])
    assert ious.shape == (2, 3)
    assert ious[1, 2] == metrics.mask_iou(a[1, 2], b[1])


def test_the_boundary_is_a_ring_as_wide_as_the_diagonal_says() -> None:
    small = metrics.boundary(box((30, 40), 5, 5, 15, 15))  # diagonal 50: one pixel
    assert small.sum() == 100 - 8 * 8
    large = metrics.boundary(box((300, 400), 100, 100, 200, 200))  # diagonal 500: ten pixels
    assert large.sum() == 100 * 100 - 80 * 80


def test_the_pictures_edge_bounds_a_mask() -> None:
    assert metrics.boundary(np.ones((30, 40), bool)).sum() == 30 * 40 - 28 * 38


def test_boundary_iou_of_a_shifted_square() -> None:
    # Rings of 36 pixels each, which share 9 pixels of the upper and 9 of the lower side.
    a, b = box((20, 20), 5, 5, 15, 15), box((20, 20), 5, 6, 15, 16)
    assert metrics.boundary_iou(a, b) == pytest.approx(18 / 54)
    assert metrics.mask_iou(a, b) == pytest.approx(90 / 110)


@pytest.mark.parametrize(
    ("height", "width", "ratio"), [(20, 31, 0.02), (70, 90, 0.02), (64, 48, 0.1), (301, 180, 0.02)]
)
def test_boundary_iou_by_chessboard_distance(height: int, width: int, ratio: float) -> None:
    def near_contour(mask: Mask) -> Mask:
        distance = scipy.ndimage.distance_transform_cdt(np.pad(mask, 1), "chessboard")[1:-1, 1:-1]
        near: Mask = mask & (distance <= max(1, round(ratio * (height**2 + width**2) ** 0.5)))
        return near

    for a, b in zip(blobs(5, height, width), blobs(5, height, width, seed=1), strict=True):
        rings = near_contour(a), near_contour(b)
        expected = (rings[0] & rings[1]).sum() / (rings[0] | rings[1]).sum()
        assert metrics.boundary_iou(a, b, ratio) == pytest.approx(expected)


def test_average_recall_by_hand() -> None:
    ious = np.array([[0.62, 0.0], [0.0, 0.97]])  # found at 3 and at 10 of 10 thresholds
    assert metrics.average_recall(ious, 1000) == pytest.approx(13 / 20)
    assert metrics.average_recall(ious, 1) == pytest.approx(3 / 20)


def test_a_mask_finds_one_segment_and_a_segment_is_found_once() -> None:
    assert metrics.average_recall(np.array([[0.99], [0.98]]), 1000) == 1
    assert metrics.average_recall(np.array([[0.98, 0.99]]), 1000) == 0.5
    # The better mask takes the segment that it overlaps most, and the next the rest.
    assert metrics.average_recall(np.array([[0.98, 0.99], [0.98, 0.98]]), 1000) == 1
    assert metrics.average_recall(np.array([[0.99, 0.98], [0.98, 0.0]]), 1000) == 0.5


def test_recall_without_masks_or_segments() -> None:
    assert metrics.average_recall(np.zeros((0, 3)), 1000) == 0
    assert np.isnan(metrics.average_recall(np.zeros((3, 0)), 1000))


@pytest.mark.parametrize("most", [1, 5, 1000])
def test_average_recall_is_cocos(most: int) -> None:
    rng = np.random.default_rng(0)
    wanted = blobs(8, 40, 50)
    found = np.concatenate([wanted, wanted, wanted]) ^ (rng.random((24, 40, 50)) < rng.uniform(0, 0.4, (24, 1, 1)))
    scores = rng.permutation(24) / 24
    order = np.argsort(-scores)
    ious = metrics.iou_matrix([rle.encode(found[i]) for i in order], [rle.encode(mask) for mask in wanted])
    ours = metrics.average_recall(ious, most)
    assert 0 < ours < 1
    assert ours == pytest.approx(cocos_average_recall(wanted, found, scores, most))


def cocos_average_recall(wanted: Mask, found: Mask, scores: NDArray[np.float64], most: int) -> float:
    def annotation(number: int, mask: Mask) -> dict[str, Any]:
        encoded = rle.encode(mask)
        area = rle.area(encoded)
        return {"id": number, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": area, "segmentation": encoded}

    truth = COCO()
    truth.dataset = {
        "images": [{"id": 1, "height": wanted.shape[1], "width": wanted.shape[2]}],
        "categories": [{"id": 1}],
        "annotations": [annotation(i + 1, mask) for i, mask in enumerate(wanted)],
        "info": {},
    }
    truth.createIndex()
    results = [annotation(i + 1, mask) | {"score": scores[i]} for i, mask in enumerate(found)]
    evaluation = COCOeval(truth, truth.loadRes(results), "segm")
    evaluation.params.useCats = 0
    evaluation.params.maxDets = [most]
    evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
    evaluation.evaluate()
    evaluation.accumulate()
    return float(evaluation.eval["recall"].mean())


def test_iou_matrix_is_the_iou_of_each_pair() -> None:
    found, wanted = blobs(3, 20, 30), blobs(2, 20, 30, seed=1)
    matrix = metrics.iou_matrix([rle.encode(mask) for mask in found], [rle.encode(mask) for mask in wanted])
    np.testing.assert_allclose(matrix, metrics.mask_iou(found[:, None], wanted[None]))
    assert metrics.iou_matrix([], [rle.encode(wanted[0])]).shape == (0, 1)


def test_coverage_counts_a_pixel_once() -> None:
    masks = [rle.encode(box((10, 10), 0, 0, 5, 10)), rle.encode(box((10, 10), 0, 0, 10, 5))]
    assert metrics.coverage(masks, 10, 10) == 0.75
    assert metrics.coverage([], 10, 10) == 0


def test_a_click_lies_where_the_border_is_farthest() -> None:
    assert prompting.farthest_from_border(box((20, 30), 2, 10, 9, 21)) == (13, 5)  # 7 x 11: first of a row of five
    assert prompting.farthest_from_border(np.ones((5, 9), bool)) == (2, 2)  # the picture's edge is a border
    thick_and_thin = box((40, 40), 10, 20, 21, 31) | box((40, 40), 14, 0, 17, 20)
    assert prompting.farthest_from_border(thick_and_thin) == (25, 15)
    with pytest.raises(ValueError, match="empty"):
        prompting.farthest_from_border(np.zeros((3, 3), bool))


def test_second_points_lie_anywhere_in_their_masks() -> None:
    masks = np.concatenate([np.repeat(box((20, 30), 3, 7, 6, 11)[None], 300, axis=0), np.zeros((1, 20, 30), bool)])
    first = np.full((301, 2), 1.5)
    points = prompting.second_points(masks, first, np.random.default_rng(0))
    assert set(map(tuple, points[:300])) == {(x, y) for x in range(7, 11) for y in range(3, 6)}
    assert points[300].tolist() == [1.5, 1.5]
    again = prompting.second_points(masks, first, np.random.default_rng(0))
    np.testing.assert_array_equal(points, again)


def test_batches_keep_the_memory_budget() -> None:
    config = AmgConfig(points_per_batch=4)
    assert list(prompting.batches(10, (8, 8), config)) == [slice(0, 4), slice(4, 8), slice(8, 10)]
    tight = AmgConfig(points_per_batch=4, memory_budget=12 * 64 * 3)
    assert [batch.stop - batch.start for batch in prompting.batches(7, (8, 8), tight)] == [3, 3, 1]
    assert len(list(prompting.batches(7, (800, 800), tight))) == 7
    assert list(prompting.batches(0, (8, 8), config)) == []


@pytest.mark.parametrize("points_a_prompt", [1, 2, 3])
def test_prompts_are_answered_as_by_the_reference(points_a_prompt: int) -> None:
    rgb, weights = PHOTOGRAPHS["portrait"](), lively_state_dict()
    predictor = SamPredictor(reference_with(weights, 128))
    predictor.set_image(rgb)
    points = (grid(6)[:12] * [rgb.shape[1], rgb.shape[0]]).reshape(-1, points_a_prompt, 2)
    masks, iou, _ = predictor.predict_torch(
        torch.from_numpy(predictor.transform.apply_coords(points, rgb.shape[:2])),
        torch.ones(points.shape[:2], dtype=torch.int),
    )
    model = model_with(weights, 128)
    answers = prompting.answer(model, model.encode(rgb), points, AmgConfig())
    np.testing.assert_allclose(answers.predicted_iou_N3, iou.numpy(), atol=1e-4)
    assert answers.masks_N3HW.shape == (len(points), 3, *rgb.shape[:2])
    assert metrics.mask_iou(answers.masks_N3HW, masks.numpy()).min() > 0.999


def test_the_chosen_mask_is_the_one_rated_highest() -> None:
    masks = blobs(6, 10, 10).reshape(2, 3, 10, 10)
    answers = Answers(masks, np.array([[0.1, 0.3, 0.2], [0.9, 0.3, 0.2]]))
    np.testing.assert_array_equal(answers.chosen_NHW, masks[[0, 1], [1, 0]])


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


def test_a_model_agrees_with_itself() -> None:
    model = model_with(lively_state_dict(), 128)
    [scores] = against_teacher.measure(
        {"itself": model}, model, [Picture("a", PHOTOGRAPHS["portrait"]())], 4, AmgConfig(points_per_batch=5)
    )["itself"]
    agreement = scores.agreement
    assert sorted(agreement.points_N.tolist()) == [1] * 16 + [2] * 16
    for column in (agreement.chosen_N, agreement.best_N, agreement.boundary_N):
        assert column.tolist() == [1] * 32
    assert len(set(agreement.share_N.tolist())) > 8
    assert scores.embedding is not None
    assert scores.embedding.mse == 0
    assert scores.embedding.cosine == pytest.approx(1, abs=1e-6)


def test_another_model_does_not() -> None:
    teacher, picture = model_with(lively_state_dict(), 128), Picture("a", PHOTOGRAPHS["portrait"]())
    students = {"other": model_with(lively_state_dict(1), 128), "smaller": model_with(lively_state_dict(), 64)}
    scores = against_teacher.compare(students, teacher, picture, 3, AmgConfig())
    assert scores["other"].agreement.chosen_N.mean() < 0.9
    assert scores["other"].agreement.boundary_N.mean() < 0.9
    assert (scores["other"].agreement.best_N >= scores["other"].agreement.chosen_N).all()
    assert scores["other"].embedding is not None
    assert scores["other"].embedding.mse > 0.01
    assert scores["other"].embedding.cosine < 0.9
    assert scores["smaller"].embedding is None
    assert 0 < scores["smaller"].agreement.chosen_N.mean() < 1


def test_the_second_points_depend_on_the_pictures_name_alone() -> None:
    teacher, student = model_with(lively_state_dict(), 64), model_with(lively_state_dict(1), 64)
    a, b = (Picture(name, PHOTOGRAPHS["small"]()) for name in "ab")
    first, alone, other = (
        against_teacher.measure({"": student}, teacher, pictures, 3, AmgConfig())[""][-1].agreement
        for pictures in ([b, a], [a], [b])
    )
    two = first.points_N == 2
    np.testing.assert_array_equal(first.chosen_N, alone.chosen_N)
    assert (first.share_N[two] != other.share_N[two]).any()
    np.testing.assert_array_equal(first.share_N[~two], other.share_N[~two])


def test_embeddings_are_compared_without_padding() -> None:
    features = torch.randn(1, 256, 4, 4, generator=torch.Generator().manual_seed(0))
    a = Embedding(features, (40, 80), (33, 64))  # three of four rows of positions see the picture
    padding, seen = features.clone(), features.clone()
    padding[:, :, 3] += 100
    seen[:, :, 2] += 2
    same = against_teacher.embedding_scores(a, replace(a, features_1CHW=padding))
    assert same == EmbeddingScores(0.0, pytest.approx(1.0))
    differing = against_teacher.embedding_scores(a, replace(a, features_1CHW=seen))
    assert differing.mse == pytest.approx(4 / 3, rel=1e-5)
    assert differing.cosine < 0.9
    opposite = against_teacher.embedding_scores(a, replace(a, features_1CHW=-features))
    assert opposite.cosine == pytest.approx(-1)


def test_large_pictures_are_compared_at_1024() -> None:
    small, large = PHOTOGRAPHS["small"](), PHOTOGRAPHS["large"]()
    assert against_teacher.compared_size(Picture("", small)) == small.shape[:2]
    assert against_teacher.compared_size(Picture("", large)) == (192, 1024)
    model = seeded_model(0, 64)
    scores = against_teacher.compare({"itself": model}, model, Picture("", large), 2, AmgConfig())["itself"]
    assert scores.agreement.chosen_N.tolist() == [1] * 8


def test_prompts_are_told_apart_by_size_and_points() -> None:
    shares = np.array([0, 0.005, 0.01, 0.1, 0.3, 1.0, 0.3])
    points = np.array([1, 1, 1, 1, 1, 1, 2])
    values = np.array([0.0, 1.0, 0.3, 0.4, 0.5, 0.7, 0.9])
    scores = StudentScores(Agreement(points, shares, values, values, values), EmbeddingScores(2.0, 0.5))
    masks, embeddings = teacher_tables("photographs", {"s": [scores, replace(scores, embedding=None)]})
    found = {row[1:3]: row[3:5] for row in masks.rows}
    assert found[1, "0% to 1%"] == (4, 0.5)
    assert found[1, "1% to 5%"] == (2, 0.3)
    assert found[1, "5% to 20%"] == (2, 0.4)
    assert found[1, "20% to 100%"] == (4, pytest.approx(0.6))
    assert found[2, "all"] == (2, 0.9)
    assert found[2, "0% to 1%"] == (0, None)
    assert embeddings.rows == (("s", 2, 2.0, 0.5),)
    text = as_markdown({"device": "cpu"}, [masks, embeddings])
    assert "| s | 1 | 0% to 1% | 4 | 0.5000 | 0.5000 | 0.5000 |" in text
    assert "| s | 2 | 0% to 1% | 0 | - | - | - |" in text


def test_felzenszwalb_finds_what_colours_tell() -> None:
    rgb = np.zeros((90, 120, 3), np.uint8)
    rgb[:, 60:] = 255
    square = box((90, 120), 20, 20, 45, 45)
    rgb[square] = (200, 30, 30)
    masks = np.stack([square, box((90, 120), 0, 60, 90, 120)])
    divided = felzenszwalb.partitions(rgb)
    answers = felzenszwalb.answer_clicks(divided, np.array([[32.0, 32.0], [90.0, 45.0]]))
    scores = against_masks.click_scores(answers, masks)
    assert scores.best_N.min() > 0.8
    found = [rle.decode(mask) for mask in felzenszwalb.proposals(divided)]
    assert metrics.mask_iou(np.stack(found)[:, None], masks[None]).max(axis=0).min() > 0.8
    assert len({mask.tobytes() for mask in found}) == len(found)


def test_felzenszwalb_shows_coarse_and_large_segments_first() -> None:
    divided = felzenszwalb.partitions(PHOTOGRAPHS["small"]())
    found = [rle.decode(mask) for mask in felzenszwalb.proposals(divided)]
    coarsest = np.bincount(divided[1600].ravel())
    assert len(coarsest) < len(np.unique(divided[50]))
    for mask, label in zip(found, np.argsort(-coarsest, kind="stable"), strict=False):
        np.testing.assert_array_equal(mask, divided[1600] == label)


def test_felzenszwalb_chooses_the_middle_scale() -> None:
    divided = felzenszwalb.partitions(PHOTOGRAPHS["small"]())
    [answer] = felzenszwalb.answer_clicks(divided, np.array([[30.0, 50.0]])).chosen_NHW
    np.testing.assert_array_equal(answer, divided[400] == divided[400][50, 30])


def test_felzenszwalb_may_show_as_many_masks_as_the_model() -> None:
    rgb = PHOTOGRAPHS["small"]()
    config = AmgConfig(**dict(KEEP_ALL, points_per_side=1))
    scores = against_masks.measure(
        {"model": model_with(lively_state_dict(), 64)},
        [Picture("", rgb, (blobs(3, 150, 226),))],
        config,
        with_felzenszwalb=True,
    )
    masks = {name: of_method[0].proposals.masks for name, of_method in scores.items()}
    assert masks["model"] == masks[against_masks.AS_MANY] == 3
    assert masks[against_masks.ALL] > 20


def test_scenes_are_those_that_nobody_trains_on() -> None:
    [first, second] = scene_pictures(2, size=128)
    expected = scenes.scene(1, 128, scenes.HELD_OUT_SEED)
    np.testing.assert_array_equal(second.rgb_HW3, expected.rgb_HW3)
    [masks] = second.people
    np.testing.assert_array_equal(masks, expected.masks_NHW[expected.masks_NHW.mean(axis=(1, 2)) >= 0.01])
    assert (first.rgb_HW3 != second.rgb_HW3).any()


def test_segments_of_less_than_a_hundredth_are_not_asked_for(tmp_path: Path) -> None:
    labels = np.ones((100, 200), np.uint16)
    labels[:10, :20] = 2  # a hundredth
    labels[20:30, :19] = 3
    folder = write_bsds(tmp_path, {"a": (np.zeros((100, 200, 3), np.uint8), [labels, labels[::-1]])})
    pictures = bsds_pictures(folder, "val")
    assert len(pictures) == 1
    [picture] = pictures
    assert [len(masks) for masks in picture.people] == [2, 2]
    np.testing.assert_array_equal(picture.people[0], [labels == 1, labels == 2])
