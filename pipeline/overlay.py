"""Masks drawn over their picture, for people to look at."""

from typing import Any, Final

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.amg import rle

_OPACITY: Final = 0.45


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


def _colour(number: int) -> NDArray[np.uint8]:
    """Hues a golden section apart, so that neighbours in the order differ."""
    hsv = np.array([[[int(number * 0.618034 * 180) % 180, 200, 255]]], np.uint8)
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0], np.uint8)
