"""Masks drawn over their picture, for people to look at: as pixels, or as outlines for a page to draw."""

from typing import Any, Final

import cv2
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco

from pipeline import rle
from pipeline.rle import Rle

_OPACITY: Final = 0.45
_TOLERANCE: Final = 0.5  # of an outline, in pixels of the picture as it is shown
_LARGEST_TOLERANCE: Final = 16.0


def overlay(rgb_HW3: NDArray[np.uint8], masks: list[dict[str, Any]]) -> NDArray[np.uint8]:
    """Each mask in a colour of its own, with an outline; small ones lie on top of large ones.

    Args:
        rgb_HW3: The picture.
        masks: Of a row of the masks table, or what `MaskGenerator.generate` returns.
    """
    drawn = rgb_HW3.copy()
    for number, mask in enumerate(sorted(masks, key=lambda mask: -mask["area"])):
        pixels = rle.decode(mask["segmentation"])
        colour = _colour(number)
        drawn[pixels] = ((1 - _OPACITY) * drawn[pixels] + _OPACITY * colour).astype(np.uint8)
        outlines, _ = cv2.findContours(pixels.view(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(drawn, outlines, -1, colour.tolist(), 1 + max(rgb_HW3.shape) // 1000)
    return drawn


def outline_path(segmentation: Rle, scale: float, most_points: int) -> str:
    """A mask's outline as the path of an SVG, holes included: to be filled by the even-odd rule.

    It runs through the middle of the border's pixels. It is simplified until it has few enough points, to within
    half a pixel as shown where that suffices (Douglas and Peucker); then the shortest pieces go.

    Args:
        segmentation: The mask.
        scale: Pixels as shown a pixel of the mask; the path is in pixels as shown, whole ones.
        most_points: Of the path, 1 at least.

    Returns:
        As `M3 4l5 0 0 6z`; empty for an empty mask.
    """
    left, top, width, height = (int(value) for value in coco.toBbox(segmentation))
    pixels = np.ascontiguousarray(rle.decode(segmentation)[top : top + height, left : left + width])
    if not pixels.size:
        return ""
    pieces, _ = cv2.findContours(pixels.view(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    longest = sorted(pieces, key=len, reverse=True)[:most_points]
    scaled = [((piece[:, 0] + [left + 0.5, top + 0.5]) * scale).astype(np.float32) for piece in longest]
    tolerance = _TOLERANCE
    while True:
        simple = [cv2.approxPolyDP(piece, tolerance, closed=True)[:, 0] for piece in scaled]
        points = np.cumsum([len(piece) for piece in simple])
        if points[-1] <= most_points or tolerance >= _LARGEST_TOLERANCE:
            break
        tolerance *= 2
    kept = max(1, int(np.searchsorted(points, most_points, side="right")))
    return "".join(_piece(piece[:most_points]) for piece in simple[:kept])


def _piece(points_N2: NDArray[Any]) -> str:
    whole_N2 = points_N2.round().astype(int)
    x, y = whole_N2[0]
    steps = " ".join(str(step) for step in np.diff(whole_N2, axis=0).ravel())
    return f"M{x} {y}l{steps or '0 0'}z".replace(" -", "-")


def _colour(number: int) -> NDArray[np.uint8]:
    """Hues a golden section apart, so that neighbours in the order differ."""
    hsv = np.array([[[int(number * 0.618034 * 180) % 180, 200, 255]]], np.uint8)
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0], np.uint8)
