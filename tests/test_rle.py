"""COCO run-length encoding."""

import tracemalloc

import numpy as np
import torch
from known_masks import blobs
from segment_anything.utils.amg import (
    coco_encode_rle,
    mask_to_rle_pytorch,
    rle_to_mask,
)

from pipeline import rle


def test_case_20_masks_with_holes_and_islands_survive_rle() -> None:
    mask = np.zeros((40, 60), dtype=bool)
    mask[5:30, 5:40] = True
    mask[10:20, 12:30] = False
    mask[13:15, 15:18] = True
    mask[35:, 55:] = True
    mask[0, 0] = True
    for pixels in (mask, ~mask, np.zeros_like(mask), np.ones_like(mask), mask[:1, :1], ~mask[:1, :1]):
        encoded = rle.encode(pixels)
        np.testing.assert_array_equal(rle.decode(encoded), pixels)
        assert rle.area(encoded) == pixels.sum()
        assert rle.uncompressed(encoded) == mask_to_rle_pytorch(torch.tensor(pixels)[None])[0]


def test_random_masks_are_encoded_as_the_reference_encodes_them() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        height, width = random.integers(1, 60, 2)
        pixels = random.random((height, width)) < random.choice([0.0, 0.02, 0.5, 0.98, 1.0])
        encoded, expected = rle.encode(pixels), mask_to_rle_pytorch(torch.tensor(pixels)[None])[0]
        assert rle.uncompressed(encoded) == expected
        assert encoded == coco_encode_rle(expected)
        np.testing.assert_array_equal(rle.decode(encoded), rle_to_mask(expected))


def test_masks_of_a_crop_are_encoded_in_the_image() -> None:
    random = np.random.default_rng(0)
    crop = random.random((3, 20, 10)) < 0.5  # K x W x H
    encoded = rle.encode_in_image(crop, [5, 7, 25, 17], (30, 40))
    for one, pixels in zip(encoded, crop, strict=True):
        expected = np.zeros((30, 40), dtype=bool)
        expected[7:17, 5:25] = pixels.T
        np.testing.assert_array_equal(rle.decode(one), expected)


def test_masks_of_a_crop_take_one_mask_of_the_image_at_a_time() -> None:
    height, width = 3000, 4000
    crop = np.ones((64, 100, 100), np.bool_)
    tracemalloc.start()
    encoded = rle.encode_in_image(crop, [500, 500, 600, 600], (height, width))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [rle.area(one) for one in encoded] == [100 * 100] * 64
    assert peak < 1.5 * height * width


def test_runs_are_those_of_the_mask() -> None:
    rng = np.random.default_rng(0)
    masks = [*blobs(5, 70, 90), np.zeros((3, 4), bool), np.ones((3, 4), bool), rng.random((40, 50)) < 0.5]
    masks.append(np.zeros((3000, 3000), bool))
    for mask in masks:
        encoded = rle.encode(mask)
        assert rle.runs(encoded["counts"]).tolist() == rle.uncompressed(encoded)["counts"]
        assert rle.is_whole(encoded)


def test_runs_that_do_not_fill_the_mask_are_not_whole() -> None:
    encoded = rle.encode(blobs(1, 40, 60)[0])
    counts = encoded["counts"]
    for damaged in ("", "0", counts[:-1], counts + "1", counts[1:], counts[:-1] + "\x7f", "o" * 20, counts + "é"):
        assert not rle.is_whole({"size": [40, 60], "counts": damaged})
    assert not rle.is_whole({"size": [60, 60], "counts": counts})
