"""Clicks: where they lie, in what batches, and what a model answers."""

import numpy as np
import pytest
import torch
from known_masks import blobs, box
from seeded import PHOTOGRAPHS, SamPredictor, grid, lively_state_dict, model_with, reference_with

from pipeline.config import AmgConfig
from pipeline.evaluation import metrics, prompting
from pipeline.evaluation.prompting import Answers


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
