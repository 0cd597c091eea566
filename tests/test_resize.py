"""Masks at full size, and what is measured of them."""

from types import SimpleNamespace
from typing import Final, cast

import numpy as np
import pytest
import torch
from drawn_masks import GIB, IMAGE_SIZE, MASK_SIZE, DrawnModel, coordinates_as_colours, draw
from seeded import Sam
from segment_anything.utils.amg import (
    batched_mask_to_box,
    calculate_stability_score,
)
from segment_anything.utils.transforms import ResizeLongestSide

from pipeline.amg.measure import measure
from pipeline.amg.resize import full_size_masks
from pipeline.model.sam import Embedding


def test_memory_budget_bounds_how_many_masks_are_made_at_once() -> None:
    embedding = DrawnModel().encode(coordinates_as_colours(500, 400))
    logits = draw((0, 0), np.array([[9.0, 9.0]] * 10))[0].flatten(0, 1)

    def sizes(budget: int) -> list[int]:
        return [len(masks) for masks in full_size_masks(logits, embedding, IMAGE_SIZE, budget)]

    one_mask = 500 * 400 + 4 * 500 * MASK_SIZE
    assert sizes(GIB) == [30]
    assert sizes(1) == [1] * 30
    assert sizes(4 * one_mask) == [4] * 7 + [2]


SIZES: Final = [(1, 1), (1, 5000), (5000, 1), (2, 3), (37, 1000), (900, 61), (256, 256), (130, 90), (600, 777)]


@pytest.mark.parametrize("image_size", [64, 256])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_resized_masks_are_those_of_two_interpolations(size: tuple[int, int], image_size: int) -> None:
    """As `Sam.postprocess_masks` does it, and scores and boxes as `segment_anything.utils.amg`."""
    height, width = (max(1, side) for side in ResizeLongestSide.get_preprocess_shape(*size, image_size))
    random = torch.Generator().manual_seed(height * 7919 + width)
    coarse = torch.randn(9, 1, 10, 10, generator=random)
    logits = torch.nn.functional.interpolate(coarse, (image_size // 4,) * 2, mode="bicubic") * 3
    logits[0], logits[1] = -2.0, 2.0  # nothing, everything
    sam = cast(Sam, SimpleNamespace(image_encoder=SimpleNamespace(img_size=image_size)))
    expected = Sam.postprocess_masks(sam, logits, (height, width), size)[:, 0]
    assert expected.shape == (9, *size)

    embedding = Embedding(torch.empty(1), size, (height, width))
    for budget in (1, GIB):
        masks = torch.cat(list(full_size_masks(logits[:, 0], embedding, image_size, budget))).transpose(1, 2)
        differ = masks != (expected > 0)
        assert expected[differ].abs().max().item() < 1e-4 if differ.any() else True
        assert differ.float().mean() < 1e-4
    for offset in (-0.5, 0, 0.5, 2):
        measured = measure(logits[:, 0], embedding, image_size, offset)
        torch.testing.assert_close(
            measured.stability_score_K,
            calculate_stability_score(expected, 0.0, offset),
            atol=1e-4,
            rtol=0,
            equal_nan=True,
        )
        assert torch.equal(measured.boxes_K4_xyxy, batched_mask_to_box(masks))
