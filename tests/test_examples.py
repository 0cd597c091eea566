"""Training examples: pictures and prompts that fit their masks, and follow from a seed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from bsds_folder import write_bsds
from small_training import FEW

from pipeline.errors import TrainingDataError
from pipeline.training import bsds
from pipeline.training.examples import (
    Batches,
    Example,
    augmented,
    bsds_source,
    mixed,
    scene_source,
    with_prompts,
)


def test_a_batch_follows_from_its_number() -> None:
    one, again = Batches(scene_source(64, 0), **FEW), Batches(scene_source(64, 0), **FEW)
    for a, b in zip(vars(one[7]).values(), vars(again[7]).values(), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert not torch.equal(one[7].pixels_B3SS, one[8].pixels_B3SS)


def test_prompts_are_on_their_targets() -> None:
    for number in range(20):
        batch = Batches(scene_source(64, 0), **FEW | {"prompts": 8})[number]
        assert batch.pixels_B3SS.shape == (2, 3, 64, 64)
        assert batch.masks_BNss.shape[2:] == (16, 16)
        for picture in range(2):
            for target, (x, y), (left, top, right, bottom) in zip(
                batch.targets_BP[picture],
                batch.points_BP2[picture].tolist(),
                batch.boxes_BP4[picture].tolist(),
                strict=True,
            ):
                mask = batch.masks_BNss[picture, target]
                assert mask[int(y) // 4, int(x) // 4] > 0
                rows, columns = (4 * (mask > 0)).nonzero().T
                width, height = 4 * (columns.max() - columns.min() + 1), 4 * (rows.max() - rows.min() + 1)
                assert 0 <= left < right <= 64
                assert 0 <= top < bottom <= 64
                assert abs(left - 4 * columns.min()) <= 0.2 * width + 4
                assert abs(bottom - 4 * (rows.max() + 1)) <= 0.2 * height + 4


def test_half_of_the_clicks_are_in_the_middle_and_half_anywhere() -> None:
    mask = np.zeros((64, 64), bool)
    mask[12:52, 12:52] = True
    example = Example("a square", np.zeros((64, 64, 3), np.uint8), mask[None])
    points = np.concatenate([with_prompts(example, 200, np.random.default_rng(seed))[3] for seed in range(5)])
    depth = 20.5 - np.abs(points - 31.5).max(axis=1)  # 1 to 20
    # Of any pixels 0.64 are no deeper than 8 and 0.09 deeper than 14; of the deepest of 16 hardly one and 0.78.
    assert np.mean(depth <= 8) == pytest.approx(0.32, abs=0.05)
    assert np.mean(depth > 14) == pytest.approx(0.43, abs=0.05)


def test_masks_of_a_hundredth_of_the_picture_are_asked_for_most() -> None:
    masks = np.zeros((3, 200, 200), bool)
    masks[0, :5, :8] = True  # a thousandth
    masks[1, 20:40, :20] = True  # a hundredth
    masks[2, 100:180, :80] = True  # 16 hundredths
    example = Example("three rectangles", np.zeros((200, 200, 3), np.uint8), masks)
    targets = with_prompts(example, 4000, np.random.default_rng(0))[2]
    assert np.bincount(targets, minlength=3) / 4000 == pytest.approx([1 / 16, 10 / 16, 5 / 16], abs=0.03)


def test_pixels_and_masks_are_cut_and_mirrored_alike() -> None:
    rgb = np.full((90, 120, 3), 60, np.uint8)
    masks = np.zeros((2, 90, 120), bool)
    masks[0, 20:70, 10:50] = True
    masks[1, 5:60, 70:118] = True
    rgb[masks[0]], rgb[masks[1]] = (250, 30, 30), (30, 30, 250)
    rng = np.random.default_rng(0)
    seen = 0
    for _ in range(40):
        made = augmented(Example("two boxes", rgb, masks), 64, rng)
        assert made.rgb_HW3.shape == (64, 64, 3)
        red, _, blue = made.rgb_HW3.astype(int).transpose(2, 0, 1)
        if (red == blue)[made.masks_NHW.any(axis=0)].all():  # turned gray
            continue
        coloured = np.stack([red > blue + 90, blue > red + 90])
        for mask in made.masks_NHW[made.masks_NHW.sum(axis=(1, 2)) > 200]:
            overlap = [(mask & colour).sum() / (mask | colour).sum() for colour in coloured]
            assert max(overlap) > 0.85
            seen += 1
    assert seen > 40


def test_the_segments_of_all_annotators_are_drawn(tmp_path: Path) -> None:
    rgb = np.zeros((40, 60, 3), np.uint8)
    left, top = np.ones((40, 60), np.uint16), np.ones((40, 60), np.uint16)
    left[:, 30:] = 2
    top[10:] = 7
    folder = write_bsds(tmp_path / "bsds", {"a": (rgb, [left, top])}, "train")
    [photograph] = [bsds.read_photograph(path) for path in bsds.photographs(folder, "train")]
    masks = bsds_source([photograph])(np.random.default_rng(0)).masks_NHW
    assert sorted(masks.sum(axis=(1, 2)).tolist()) == [600, 1200, 1200, 1800]
    assert bsds.segments(top, smallest=0.3).sum() == 1800
    with pytest.raises(TrainingDataError, match="no BSDS500"):
        bsds.photographs(folder, "val")


def test_sources_are_mixed_by_their_shares() -> None:
    def named(name: str) -> Example:
        return Example(name, np.zeros((8, 8, 3), np.uint8), np.ones((1, 8, 8), bool))

    source = mixed([lambda _: named("a"), lambda _: named("b")], [1, 3])
    rng = np.random.default_rng(0)
    assert 650 < sum(source(rng).name == "b" for _ in range(1000)) < 850


@pytest.mark.parametrize("size", [(9, 40), (40, 9), (5, 5), (1, 300), (300, 1)])
def test_small_pictures_are_examples_too(size: tuple[int, int]) -> None:
    rgb, masks = np.full((*size, 3), 200, np.uint8), np.ones((1, *size), bool)
    rng = np.random.default_rng(0)
    for _ in range(20):
        made = augmented(Example("small", rgb, masks), 64, rng, 128)
        assert made.rgb_HW3.shape == (64, 64, 3)
        assert made.masks_NHW.shape == (1, 64, 64)


def test_masks_are_where_the_pixels_are_to_half_a_pixel() -> None:
    """Every other column: what a nearest neighbour that is off by a fraction would miss."""
    columns = np.zeros((3, 3), bool)
    columns[:, 1] = True
    rgb = np.where(columns[..., None], 255, 0).astype(np.uint8).repeat(3, axis=2)
    made = augmented(Example("columns", rgb, columns[None]), 64, np.random.default_rng(0))
    [mask] = made.masks_NHW
    taken = mask[0].nonzero()[0]
    height, width = 64, 64
    assert mask.shape == (height, width)
    assert taken.mean() == pytest.approx(31.5, abs=0.01)


def test_a_source_without_masks_is_an_error_that_names_its_last_example() -> None:
    speck = np.zeros((1, 100, 100), bool)
    speck[0, 50, 50] = True
    drawn = []

    def source(_: np.random.Generator) -> Example:
        drawn.append(f"picture {len(drawn)}")
        return Example(drawn[-1], np.zeros((100, 100, 3), np.uint8), speck)

    with pytest.raises(TrainingDataError, match=r"100 examples one after another .* of them picture 99\."):
        Batches(source, **FEW | {"image_size": 128})[0]
