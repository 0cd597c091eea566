import numpy as np
import pytest
from scipy import ndimage
from skimage import data

from pipeline.training.scenes import HELD_OUT_SEED, scene


def test_a_scene_follows_from_its_index_and_seed() -> None:
    one, again = scene(5, 128, seed=3), scene(5, 128, seed=3)
    assert np.array_equal(one.rgb_HW3, again.rgb_HW3)
    assert np.array_equal(one.masks_NHW, again.masks_NHW)
    for other in (scene(6, 128, seed=3), scene(5, 128, seed=HELD_OUT_SEED)):
        assert not np.array_equal(one.rgb_HW3, other.rgb_HW3)


@pytest.mark.parametrize("size", [64, 128, 320])
def test_masks_are_exact_in_form(size: int) -> None:
    for index in range(10):
        made = scene(index, size)
        assert made.rgb_HW3.shape == (size, size, 3)
        assert made.rgb_HW3.dtype == np.uint8
        assert made.masks_NHW.dtype == bool
        assert made.masks_NHW.shape[1:] == (size, size)
        assert made.masks_NHW.any(axis=(1, 2)).all()
        areas = made.masks_NHW.sum(axis=(1, 2))
        assert (np.diff(areas) <= 0).all()
        assert len(np.unique(made.masks_NHW.reshape(len(areas), -1), axis=0)) == len(areas)


def test_instances_either_exclude_or_contain_each_other() -> None:
    nested = 0
    for index in range(40):
        masks = scene(index, 128).masks_NHW.reshape(-1, 128 * 128)
        for i, larger in enumerate(masks):
            for smaller in masks[i + 1 :]:
                common = (larger & smaller).sum()
                assert common in (0, smaller.sum())
                nested += common > 0
    assert nested > 20


def test_nearly_every_pixel_belongs_to_something() -> None:
    covered = [scene(index, 128).masks_NHW.any(axis=0).mean() for index in range(20)]
    assert min(covered) > 0.97


def test_things_are_seen_where_their_masks_are() -> None:
    """Colours change more across the masks' edges than elsewhere."""
    across, elsewhere = [], []
    for index in range(30):
        made = scene(index, 128)
        steps = np.abs(np.diff(made.rgb_HW3.astype(int), axis=1)).sum(axis=2)
        edges = (made.masks_NHW[:, :, 1:] != made.masks_NHW[:, :, :-1]).any(axis=0)
        across.append(steps[edges].mean())
        elsewhere.append(steps[~ndimage.binary_dilation(edges, iterations=2)].mean())
    assert np.mean(across) > 3 * np.mean(elsewhere)


def test_sizes_go_from_specks_to_most_of_the_picture() -> None:
    shares = np.concatenate([scene(index, 128).masks_NHW.mean(axis=(1, 2)) for index in range(40)])
    assert (shares < 0.002).sum() > 20
    assert (shares > 0.3).sum() > 20


def test_amplitudes_fall_with_frequency_as_in_nature() -> None:
    """As a power of it. BSDS500's photographs have an exponent of -1.3 by this measure."""
    size = 128
    mean = np.zeros((size, size))
    for index in range(30):
        gray = scene(index, size).rgb_HW3.mean(axis=2) * np.hanning(size)[:, None] * np.hanning(size)
        mean += np.abs(np.fft.fft2(gray - gray.mean()))
    radius = np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size)))
    band = (radius > 0.03) & (radius < 0.3)
    slope = np.polyfit(np.log(radius[band]), np.log(mean[band]), 1)[0]
    assert -1.75 < slope < -1.0


def test_photographs_serve_as_surfaces() -> None:
    photograph = np.zeros((60, 60, 3), np.uint8)
    photograph[..., 1] = 255  # a green that nothing else has
    green = 0
    for index in range(10):
        rgb = scene(index, 96, photographs=[photograph]).rgb_HW3.astype(int)
        green += ((rgb[..., 1] > 150) & (rgb[..., 0] < 60) & (rgb[..., 2] < 60)).sum()
    assert green > 10_000
    assert scene(0, 96, photographs=[data.coffee()]).rgb_HW3.shape == (96, 96, 3)
