"""RLE from runs that are found on the masks' device is pycocotools' own."""

import numpy as np
import pytest
import torch
from known_masks import blobs

from pipeline import rle
from pipeline.amg import runs


def transposed(masks_KHW: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(masks_KHW.transpose(0, 2, 1)))


def test_known_masks() -> None:
    masks = np.zeros((6, 30, 20), np.bool_)
    masks[1] = True
    masks[2, 0, 0] = masks[3, -1, -1] = masks[4, 5:9] = True
    masks[5, ::2] = True
    encoded = runs.encode_by_runs(transposed(masks))
    assert encoded == [rle.encode(mask) for mask in masks]
    assert [rle.area(one) for one in encoded] == masks.sum((1, 2)).tolist()


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (97, 61)])
def test_masks_of_many_shapes(size: tuple[int, int]) -> None:
    masks = np.concatenate([blobs(9, *size), ~blobs(3, *size, seed=1)])
    assert runs.encode_by_runs(transposed(masks)) == [rle.encode(mask) for mask in masks]


def test_no_masks() -> None:
    assert runs.encode_by_runs(torch.zeros(0, 8, 9, dtype=torch.bool)) == []


def test_masks_that_cannot_be_searched_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = blobs(7, 30, 50)
    whole = runs.encode_by_runs(transposed(masks))
    for pixels in (1, 2 * 1500, 2 * 1500 + 1499):
        monkeypatch.setattr(runs, "_PIXELS_AT_ONCE", pixels)
        assert runs.encode_by_runs(transposed(masks)) == whole


def test_runs_are_found_on_the_device_where_the_crop_is_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = blobs(4, 30, 50)
    monkeypatch.setattr(torch.Tensor, "device", property(lambda _: torch.device("cuda")))
    monkeypatch.setattr(rle, "encode_in_image", lambda *_: pytest.fail("on the host"))
    found = runs.encode_in_image(transposed(masks), [0, 0, 50, 30], (30, 50))
    assert found == [rle.encode(mask) for mask in masks]


def test_masks_of_a_crop_are_those_of_pycocotools() -> None:
    crop = transposed(blobs(4, 30, 50))
    box, size = [10, 20, 60, 50], (80, 90)
    assert runs.encode_in_image(crop, box, size) == rle.encode_in_image(crop.numpy(), box, size)
