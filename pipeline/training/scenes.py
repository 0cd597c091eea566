"""Synthetic scenes: pictures whose instance masks are exact.

Shapes of many kinds and sizes lie over each other on a divided background; some have holes, some have parts.
Surfaces have the 1/f amplitude spectra of natural pictures (Field 1987, https://doi.org/10.1364/JOSAA.4.002379),
shading and cast shadows; the whole gets uneven light, blur, noise and JPEG artefacts. Everything is drawn from
one seed and one index, so a scene never needs to be stored.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.training.shapes import Alpha, random_shape, with_holes
from pipeline.training.surfaces import Random, Rgb, Surface, noise, random_surface

Mask = NDArray[np.bool_]

HELD_OUT_SEED: Final = 1_000_003
"""For measuring; never trained on."""


@dataclass(frozen=True)
class Scene:
    """A picture and its instances."""

    rgb_HW3: Rgb
    masks_NHW: Mask
    """What is visible of each instance, nowhere empty. A part's mask lies inside its whole's."""


def scene(index: int, size: int = 512, seed: int = 0, photographs: Sequence[Rgb] = ()) -> Scene:
    """The scene of an index.

    Args:
        index: Any number from 0. The same index, size, seed and photographs give the same scene.
        size: Height and width in pixels, at least 64.
        seed: Of the whole series.
        photographs: uint8 RGB pictures whose pieces serve as surfaces besides the synthetic ones.
    """
    rng = np.random.default_rng([seed, index])
    canvas = _Canvas(size, photographs)
    for region in _background_regions(rng, size):
        canvas.paint(rng, region, (0, 0), random_surface(rng, size, size, photographs), parent=0)
    count = int(np.exp(rng.uniform(np.log(2), np.log(30))))
    while count > 0:
        copies = int(rng.integers(3, 12)) if rng.random() < 0.2 else 1
        _add_objects(rng, canvas, min(copies, count))
        count -= copies
    return Scene(_photographed(rng, canvas.pixels), canvas.visible_masks())


class _Canvas:
    """Pixels, and for each the number of the instance on top."""

    def __init__(self, size: int, photographs: Sequence[Rgb]) -> None:
        self.size, self.photographs = size, photographs
        self.pixels: Surface = np.zeros((size, size, 3), np.float32)
        self.labels = np.zeros((size, size), np.int32)
        self.parents = [0]

    def paint(
        self, rng: Random, alpha: Alpha, corner: tuple[int, int], surface: Surface, parent: int
    ) -> tuple[int, Mask]:
        """Lay a surface in the form of `alpha` at `corner` (x, y); return its number and its mask there."""
        x, y = corner
        height, width = alpha.shape
        opacity = cv2.GaussianBlur(alpha, (3, 3), 0) if rng.random() < 0.5 else alpha
        share = (opacity.astype(np.float32) / 255)[..., None]
        window = np.s_[y : y + height, x : x + width]
        self.pixels[window] += share * (surface - self.pixels[window])
        mask = alpha > 127
        self.parents.append(parent)
        number = len(self.parents) - 1
        self.labels[window][mask] = number
        return number, mask

    def shade(self, alpha: Alpha, corner: tuple[int, int], strength: float) -> None:
        """Darken where a shadow falls."""
        x, y = corner
        left, top = max(x, 0), max(y, 0)
        right, bottom = min(x + alpha.shape[1], self.size), min(y + alpha.shape[0], self.size)
        if left < right and top < bottom:
            part = alpha[top - y : bottom - y, left - x : right - x].astype(np.float32)[..., None]
            self.pixels[top:bottom, left:right] *= 1 - strength / 255 * part

    def visible_masks(self) -> Mask:
        """Of each instance that still shows, with its parts; larger first."""
        smallest = max(4, (self.size // 128) ** 2)
        belongs = np.eye(len(self.parents), dtype=bool)
        for number in range(len(self.parents) - 1, 0, -1):
            belongs[self.parents[number]] |= belongs[number]
        areas = belongs @ np.bincount(self.labels.ravel(), minlength=len(self.parents))
        shown = [number for number in range(1, len(self.parents)) if areas[number] >= smallest]
        shown.sort(key=lambda number: -areas[number])
        kept: list[int] = []
        for number in shown:  # a whole that is covered by its parts is the same mask as them
            if not any(areas[number] == areas[other] and belongs[other, number] for other in kept):
                kept.append(number)
        return belongs[kept][:, self.labels] if kept else np.ones((1, self.size, self.size), bool)


def _add_objects(rng: Random, canvas: _Canvas, copies: int) -> None:
    """One object, or several that look alike, with their parts."""
    size = canvas.size
    diameter = size * float(np.exp(rng.uniform(np.log(0.04), np.log(1.0 if copies == 1 else 0.25))))
    shape = random_shape(rng)
    surface = random_surface(rng, size, size, canvas.photographs)
    shadow, relief = rng.random() < 0.4, rng.random() < 0.5
    for _ in range(copies):
        alpha = shape(rng, max(6, int(diameter * rng.uniform(0.8, 1.2))))
        alpha = with_holes(rng, alpha) if rng.random() < 0.1 else alpha
        alpha, corner = _placed(rng, alpha, size)
        if not (alpha > 127).any():
            continue
        x, y = corner
        height, width = alpha.shape
        if shadow:
            _cast_shadow(rng, canvas, alpha, corner)
        piece = surface[y : y + height, x : x + width]
        if relief:
            piece = piece * _relief(rng, alpha)
        number, mask = canvas.paint(rng, alpha, corner, piece, parent=0)
        if rng.random() < 0.35 and min(height, width) >= 16:
            _add_parts(rng, canvas, number, mask, corner)


def _add_parts(rng: Random, canvas: _Canvas, whole: int, mask: Mask, corner: tuple[int, int]) -> None:
    height, width = mask.shape
    for _ in range(rng.integers(1, 4)):
        diameter = max(5, int(min(height, width) * rng.uniform(0.15, 0.7)))
        part = random_shape(rng)(rng, diameter)[:height, :width]
        x = int(rng.integers(0, width - part.shape[1] + 1))
        y = int(rng.integers(0, height - part.shape[0] + 1))
        part = np.where(mask[y : y + part.shape[0], x : x + part.shape[1]], part, 0).astype(np.uint8)
        if (part > 127).sum() >= 16:
            surface = random_surface(rng, part.shape[0], part.shape[1], canvas.photographs)
            canvas.paint(rng, part, (corner[0] + x, corner[1] + y), surface, parent=whole)


def _placed(rng: Random, alpha: Alpha, size: int) -> tuple[Alpha, tuple[int, int]]:
    """Put a shape somewhere; what lies outside the picture is cut off."""
    height, width = alpha.shape
    x, y = (int(rng.integers(-side // 3, size - 2 * side // 3 + 1)) for side in (width, height))
    left, top = max(x, 0), max(y, 0)
    return alpha[top - y : size - y, left - x : size - x], (left, top)


def _cast_shadow(rng: Random, canvas: _Canvas, alpha: Alpha, corner: tuple[int, int]) -> None:
    reach = max(1, min(alpha.shape) // 8)
    soft = np.pad(alpha, 2 * reach)
    soft = np.asarray(cv2.blur(soft, (reach | 1, reach | 1)), np.uint8)
    dx, dy = rng.integers(-reach, reach + 1, 2)
    canvas.shade(soft, (corner[0] - 2 * reach + int(dx), corner[1] - 2 * reach + int(dy)), rng.uniform(0.2, 0.7))


def _relief(rng: Random, alpha: Alpha) -> Surface:
    """Light from one side on a surface that bulges, H x W x 1, about 1."""
    height, width = alpha.shape
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j].astype(np.float32)
    light = rng.uniform(0.1, 0.5) * (np.cos(angle) * x + np.sin(angle) * y)
    if rng.random() < 0.5:
        padded = cv2.copyMakeBorder((alpha > 127).astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT)
        depth = cv2.distanceTransform(padded, cv2.DIST_L2, 3)[1:-1, 1:-1]
        light = light - rng.uniform(0.1, 0.5) * (1 - depth / max(float(depth.max()), 1e-6)) ** 2
    relief: Surface = np.clip(1 + light, 0.2, 1.8).astype(np.float32)[..., None]
    return relief


def _background_regions(rng: Random, size: int) -> list[Alpha]:
    """One region that fills the picture, and up to three that divide it: ground, sky, walls."""
    regions = [np.full((size, size), 255, np.uint8)]
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    for _ in range(rng.choice(4, p=(0.35, 0.35, 0.2, 0.1))):
        angle = rng.normal(np.pi / 2, 0.3) if rng.random() < 0.6 else rng.uniform(0, 2 * np.pi)
        level = np.cos(angle) * x + np.sin(angle) * y - rng.uniform(-0.7, 0.7)
        if rng.random() < 0.6:
            level += noise(rng, size, size, rng.uniform(0.1, 0.6), smoothest=True) * rng.uniform(0.02, 0.3)
        regions.append(np.clip(level * size / 2 * 255 + 127, 0, 255).astype(np.uint8))
    return regions


def _photographed(rng: Random, pixels: Surface) -> Rgb:
    """What a camera makes of the scene: light, blur, noise, JPEG."""
    size = len(pixels)
    if rng.random() < 0.5:
        light = 1 + rng.uniform(0.05, 0.3) * noise(rng, size, size, rng.uniform(0.05, 0.2))
        pixels = pixels * np.clip(light, 0.3, 1.7)[..., None]
    if rng.random() < 0.4:
        pixels = np.asarray(cv2.GaussianBlur(pixels, (0, 0), rng.uniform(0.3, 1.2)), np.float32)
    if rng.random() < 0.6:
        pixels = pixels + rng.normal(size=pixels.shape).astype(np.float32) * rng.uniform(1, 10)
    rgb: Rgb = np.clip(pixels, 0, 255).astype(np.uint8)
    if rng.random() < 0.5:
        quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(30, 95))]
        rgb = np.asarray(cv2.imdecode(cv2.imencode(".jpg", rgb, quality)[1], cv2.IMREAD_COLOR), np.uint8)
    return rgb
