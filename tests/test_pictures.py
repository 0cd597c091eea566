"""The pictures that models are measured on, and the segments that are asked for."""

from pathlib import Path

import numpy as np
from bsds_folder import write_bsds

from pipeline.evaluation.pictures import bsds_pictures, scene_pictures
from pipeline.training import scenes


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
