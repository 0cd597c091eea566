"""Outlines: filled again they are the mask."""

import re

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline import rle
from pipeline.overlay import outline_path

Mask = NDArray[np.bool_]
Y, X = np.mgrid[:120, :160]
RING = (abs(np.hypot(X - 70, Y - 60) - 35) < 12) | (np.hypot(X - 140, Y - 20) < 9)


def filled(path: str, height: int, width: int) -> Mask:
    """What an SVG's even-odd rule fills, with the border."""
    assert re.fullmatch(r"(M-?\d+ -?\d+l(-?\d+[ -]?)+z)+", path), path
    pieces = []
    for piece in path.split("z")[:-1]:
        numbers = np.array([int(number) for number in re.findall(r"-?\d+", piece)]).reshape(-1, 2)
        pieces.append(numbers.cumsum(axis=0).astype(np.int32))
    pixels = np.zeros((height, width), np.uint8)
    cv2.fillPoly(pixels, pieces, 1)
    cv2.polylines(pixels, pieces, isClosed=True, color=1)
    return pixels.astype(np.bool_)


def iou(one: Mask, two: Mask) -> float:
    return float((one & two).sum() / (one | two).sum())


def test_a_filled_outline_is_the_mask_with_its_hole_and_its_island() -> None:
    path = outline_path(rle.encode(RING), 1.0, 500)
    assert path.count("M") == 3
    again = filled(path, *RING.shape)
    assert iou(again, RING) > 0.93
    assert not again[60, 70]
    assert again[20, 140]


def test_an_outline_is_in_pixels_as_shown() -> None:
    half = filled(outline_path(rle.encode(RING), 0.5, 500), 60, 80)
    assert iou(half, RING[::2, ::2]) > 0.85


@pytest.mark.parametrize("most", [1, 7, 60])
def test_an_outline_has_no_more_points_than_allowed(most: int) -> None:
    """Of noise, which has hundreds of pieces; the largest stay."""
    noise = np.random.default_rng(0).random((90, 120)) < 0.3
    noise[10:40, 20:70] = True
    path = outline_path(rle.encode(noise), 1.0, most)
    points = sum(len(re.findall(r"-?\d+", piece)) // 2 for piece in path.split("z"))
    assert 1 <= points <= most + path.count("l0 0z")
    if most == 60:
        assert filled(path, 90, 120)[25, 45]


def test_a_single_pixel_and_no_pixel_are_outlined() -> None:
    pixel = np.zeros((9, 12), np.bool_)
    assert outline_path(rle.encode(pixel), 1.0, 10) == ""
    pixel[3, 5] = True
    assert outline_path(rle.encode(pixel), 1.0, 10) == "M6 4l0 0z"
