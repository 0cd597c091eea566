"""Shapes of synthetic scenes: blobs, polygons, boxes, ellipses, rings, thin things, glyphs and clouds."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pipeline.training.surfaces import Random, noise

Alpha = NDArray[np.uint8]
"""0 outside a shape, 255 inside, between them along its edge."""
_SUBPIXEL_BITS: Final = 4
_GLYPHS: Final = "ABCDEFGHJKLMNPQRSTUVWXYZabdefghkmnpqrstuwyz0123456789&%@#?"


def _drawn(points_N2: NDArray[np.floating[Any]]) -> Alpha:
    """A filled polygon with smooth edges, moved to the corner."""
    points = points_N2 - points_N2.min(axis=0) + 1
    width, height = np.ceil(points.max(axis=0)).astype(int) + 2
    alpha = np.zeros((height, width), np.uint8)
    fixed = np.round(points * 2**_SUBPIXEL_BITS).astype(np.int32)
    cv2.fillPoly(alpha, [fixed], 255, cv2.LINE_AA, _SUBPIXEL_BITS)
    return alpha


def _turned(rng: Random, points_N2: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    angle = rng.uniform(0, 2 * np.pi)
    cos, sin = np.cos(angle), np.sin(angle)
    turned: NDArray[np.floating[Any]] = points_N2 @ np.array([[cos, sin], [-sin, cos]])
    return turned


def _blob(rng: Random, diameter: int) -> Alpha:
    angles = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    harmonics = np.arange(1, 9)
    strength = rng.normal(size=8) * rng.uniform(0.1, 0.5) / harmonics
    radius = 1 + (strength[:, None] * np.cos(harmonics[:, None] * angles + rng.uniform(0, 7, 8)[:, None])).sum(0)
    radius = np.clip(radius, 0.15, None) * diameter / 2
    points = np.stack([radius * np.cos(angles) * rng.uniform(0.4, 1), radius * np.sin(angles)], axis=1)
    return _drawn(_turned(rng, points))


def _polygon(rng: Random, diameter: int) -> Alpha:
    angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 10)))
    radius = diameter / 2 * rng.uniform(0.4 if rng.random() < 0.5 else 0.9, 1, len(angles))
    return _drawn(np.stack([radius * np.cos(angles), radius * np.sin(angles)], axis=1))


def _box(rng: Random, diameter: int) -> Alpha:
    width, height = diameter, diameter * rng.uniform(0.15, 1)
    corners = np.array([[0, 0], [width, 0], [width, height], [0, height]])
    return _drawn(_turned(rng, corners) if rng.random() < 0.6 else corners)


def _ellipse(rng: Random, diameter: int) -> Alpha:
    angles = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    points = diameter / 2 * np.stack([np.cos(angles), rng.uniform(0.25, 1) * np.sin(angles)], axis=1)
    return _drawn(_turned(rng, points))


def _ring(rng: Random, diameter: int) -> Alpha:
    alpha = _ellipse(rng, diameter)
    inner = cv2.resize(alpha, None, fx=0.6, fy=0.6, interpolation=cv2.INTER_AREA)
    y, x = (np.array(alpha.shape) - inner.shape) // 2
    window = alpha[y : y + inner.shape[0], x : x + inner.shape[1]]
    np.minimum(window, 255 - inner, out=window)
    return alpha


def _thin(rng: Random, diameter: int) -> Alpha:
    """A bent line: wire, branch, rope."""
    control = rng.uniform(0, diameter, (4, 2))
    t = np.linspace(0, 1, 48)[:, None]
    curve = (
        (1 - t) ** 3 * control[0]
        + 3 * (1 - t) ** 2 * t * control[1]
        + 3 * (1 - t) * t**2 * control[2]
        + t**3 * control[3]
    )
    thickness = int(rng.integers(2, max(3, diameter // 12) + 1))
    points = curve - curve.min(axis=0) + thickness
    width, height = np.ceil(points.max(axis=0)).astype(int) + thickness + 1
    alpha = np.zeros((height, width), np.uint8)
    fixed = np.round(points * 2**_SUBPIXEL_BITS).astype(np.int32)
    cv2.polylines(alpha, [fixed], False, 255, thickness, cv2.LINE_AA, _SUBPIXEL_BITS)
    return alpha


def _glyph(rng: Random, diameter: int) -> Alpha:
    """A letter or a digit, turned."""
    text = _GLYPHS[rng.integers(len(_GLYPHS))]
    font = _font(max(8, diameter // 8 * 8))
    left, top, right, bottom = font.getbbox(text)
    image = Image.new("L", (int(right - left) + 2, int(bottom - top) + 2))
    ImageDraw.Draw(image).text((1 - left, 1 - top), text, fill=255, font=font)
    return np.array(image.rotate(rng.uniform(-60, 60), Image.Resampling.BILINEAR, expand=True))


def _cloud(rng: Random, diameter: int) -> Alpha:
    """Ragged: a level set of 1/f noise, fading outwards."""
    rough = noise(rng, diameter, diameter, rng.uniform(0.1, 0.5), smoothest=True)
    y, x = np.mgrid[-1 : 1 : diameter * 1j, -1 : 1 : diameter * 1j]
    level = rough * 0.4 + 0.6 - (x**2 + y**2) * rng.uniform(0.8, 1.4)
    sharp: Alpha = np.clip(level * diameter * 8 + 127, 0, 255).astype(np.uint8)
    return sharp


@lru_cache(maxsize=128)
def _font(size: int) -> Any:
    return ImageFont.load_default(size)


_SHAPES: Final[tuple[Callable[[Random, int], Alpha], ...]] = (
    _blob,
    _polygon,
    _box,
    _ellipse,
    _ring,
    _thin,
    _glyph,
    _cloud,
)
_SHAPE_SHARES: Final = (0.27, 0.16, 0.16, 0.12, 0.04, 0.07, 0.06, 0.12)


def random_shape(rng: Random) -> Callable[[Random, int], Alpha]:
    """A kind of shape: from a diameter in pixels to an alpha of about that size, uint8 H x W, 0 to 255."""
    return _SHAPES[rng.choice(len(_SHAPES), p=_SHAPE_SHARES)]


def with_holes(rng: Random, alpha: Alpha) -> Alpha:
    """A shape, changed in place: one to three elliptic holes, a tenth to three tenths of its shorter side wide."""
    height, width = alpha.shape
    for _ in range(rng.integers(1, 4)):
        hole = _ellipse(rng, max(4, int(min(height, width) * rng.uniform(0.1, 0.3))))[:height, :width]
        y, x = (
            int(rng.integers(0, whole - part + 1)) for whole, part in zip(alpha.shape, hole.shape, strict=True)
        )
        window = alpha[y : y + hole.shape[0], x : x + hole.shape[1]]
        np.minimum(window, 255 - hole, out=window)
    return alpha
