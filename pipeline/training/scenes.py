"""Synthetic scenes: pictures whose instance masks are exact.

Shapes of many kinds and sizes lie over each other on a divided background; some have holes, some have parts.
Surfaces have the 1/f amplitude spectra of natural pictures (Field 1987, https://doi.org/10.1364/JOSAA.4.002379),
shading and cast shadows; the whole gets uneven light, blur, noise and JPEG artefacts. Everything is drawn from
one seed and one index, so a scene never needs to be stored.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Rgb = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Alpha = NDArray[np.uint8]
"""0 outside a shape, 255 inside, between them along its edge."""
Surface = NDArray[np.float32]
"""H x W x 3, 0 to 255."""
Random = np.random.Generator

HELD_OUT_SEED: Final = 1_000_003
"""For measuring; never trained on."""
_TILE: Final = 512
_TILES: Final = 12
_SUBPIXEL_BITS: Final = 4
_GLYPHS: Final = "ABCDEFGHJKLMNPQRSTUVWXYZabdefghkmnpqrstuwyz0123456789&%@#?"


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
        canvas.paint(rng, region, (0, 0), _surface(rng, size, size, photographs), parent=0)
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
    shape = _SHAPES[rng.choice(len(_SHAPES), p=_SHAPE_SHARES)]
    surface = _surface(rng, size, size, canvas.photographs)
    shadow, relief = rng.random() < 0.4, rng.random() < 0.5
    for _ in range(copies):
        alpha = shape(rng, max(6, int(diameter * rng.uniform(0.8, 1.2))))
        alpha = _with_holes(rng, alpha) if rng.random() < 0.1 else alpha
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
        part = _SHAPES[rng.choice(len(_SHAPES), p=_SHAPE_SHARES)](rng, diameter)[:height, :width]
        x = int(rng.integers(0, width - part.shape[1] + 1))
        y = int(rng.integers(0, height - part.shape[0] + 1))
        part = np.where(mask[y : y + part.shape[0], x : x + part.shape[1]], part, 0).astype(np.uint8)
        if (part > 127).sum() >= 16:
            surface = _surface(rng, part.shape[0], part.shape[1], canvas.photographs)
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


# Shapes: each takes a diameter in pixels and returns an alpha of about that size.


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
    noise = _noise(rng, diameter, diameter, rng.uniform(0.1, 0.5), smoothest=True)
    y, x = np.mgrid[-1 : 1 : diameter * 1j, -1 : 1 : diameter * 1j]
    level = noise * 0.4 + 0.6 - (x**2 + y**2) * rng.uniform(0.8, 1.4)
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


def _with_holes(rng: Random, alpha: Alpha) -> Alpha:
    height, width = alpha.shape
    for _ in range(rng.integers(1, 4)):
        hole = _ellipse(rng, max(4, int(min(height, width) * rng.uniform(0.1, 0.3))))[:height, :width]
        y, x = (
            int(rng.integers(0, whole - part + 1)) for whole, part in zip(alpha.shape, hole.shape, strict=True)
        )
        window = alpha[y : y + hole.shape[0], x : x + hole.shape[1]]
        np.minimum(window, 255 - hole, out=window)
    return alpha


def _background_regions(rng: Random, size: int) -> list[Alpha]:
    """One region that fills the picture, and up to three that divide it: ground, sky, walls."""
    regions = [np.full((size, size), 255, np.uint8)]
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    for _ in range(rng.choice(4, p=(0.35, 0.35, 0.2, 0.1))):
        angle = rng.normal(np.pi / 2, 0.3) if rng.random() < 0.6 else rng.uniform(0, 2 * np.pi)
        level = np.cos(angle) * x + np.sin(angle) * y - rng.uniform(-0.7, 0.7)
        if rng.random() < 0.6:
            level += _noise(rng, size, size, rng.uniform(0.1, 0.6), smoothest=True) * rng.uniform(0.02, 0.3)
        regions.append(np.clip(level * size / 2 * 255 + 127, 0, 255).astype(np.uint8))
    return regions


# Surfaces.


def _surface(rng: Random, height: int, width: int, photographs: Sequence[Rgb]) -> Surface:
    """A surface of one material, H x W x 3."""
    if len(photographs) and rng.random() < 0.5:
        return _piece_of_photograph(rng, height, width, photographs[int(rng.integers(len(photographs)))])
    colour = _colour(rng)
    surface = np.broadcast_to(colour, (height, width, 3)).astype(np.float32)
    kind = rng.random()
    if kind < 0.65:
        rough = _noise(rng, height, width, rng.uniform(0.5, 2))
        other = _colour(rng) if rng.random() < 0.3 else colour * rng.uniform(0.2, 1.8)
        surface = surface + (other - surface) * (0.5 + rng.uniform(0.2, 0.8) * rough[..., None])
    elif kind < 0.85:
        pattern = _pattern(rng, height, width)
        surface = surface + (_colour(rng) - surface) * pattern[..., None]
    if rng.random() < 0.5:
        y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j].astype(np.float32)
        angle = rng.uniform(0, 2 * np.pi)
        surface = surface * (1 + rng.uniform(0, 0.4) * (np.cos(angle) * x + np.sin(angle) * y))[..., None]
    return np.clip(surface, 0, 255).astype(np.float32)


def _colour(rng: Random) -> NDArray[np.float32]:
    """Mostly dull, as in nature."""
    hue, saturation, value = rng.uniform(0, 180), 255 * rng.beta(1.3, 2), 255 * rng.beta(2, 1.7)
    hsv = np.array([[[hue, saturation, value]]]).astype(np.uint8)
    rgb: NDArray[np.float32] = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0].astype(np.float32)
    return rgb


def _pattern(rng: Random, height: int, width: int) -> NDArray[np.float32]:
    """Stripes, checks or dots, bent a little, 0 to 1."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    period = float(np.exp(rng.uniform(np.log(4), np.log(60))))
    angle = rng.uniform(0, np.pi)
    bend = _noise(rng, height, width, 0.5) * rng.uniform(0, 0.6)
    u = (np.cos(angle) * x + np.sin(angle) * y) / period + bend
    v = (np.cos(angle) * y - np.sin(angle) * x) / period + bend
    wave = (
        np.sin(2 * np.pi * u),
        np.sin(2 * np.pi * u) * np.sin(2 * np.pi * v),
        np.cos(2 * np.pi * u) + np.cos(2 * np.pi * v) - 1,
    )[rng.integers(3)]
    contrast = rng.uniform(0.2, 1)
    pattern: NDArray[np.float32] = (contrast * np.clip(wave * rng.uniform(1, 8) + 0.5, 0, 1)).astype(np.float32)
    return pattern


def _piece_of_photograph(rng: Random, height: int, width: int, rgb_HW3: Rgb) -> Surface:
    """A random piece at a random scale, mirrored or not, its brightness and colours changed a little."""
    share = rng.uniform(0.15, 0.9)
    side = max(4, int(min(rgb_HW3.shape[:2]) * share))
    y, x = (int(rng.integers(0, length - side + 1)) for length in rgb_HW3.shape[:2])
    piece = cv2.resize(rgb_HW3[y : y + side, x : x + side], (width, height), interpolation=cv2.INTER_LINEAR)
    piece = piece[:, ::-1] if rng.random() < 0.5 else piece
    changed = piece.astype(np.float32) * rng.uniform(0.7, 1.3, 3) + rng.uniform(-25, 25)
    return np.clip(changed, 0, 255).astype(np.float32)


@lru_cache(maxsize=1)
def _noise_tiles() -> NDArray[np.float32]:
    """Periodic 1/f noise of mean 0 and deviation 1, T x 512 x 512, always the same."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(_TILE)[:, None], np.fft.rfftfreq(_TILE)[None])
    frequency[0, 0] = 1
    tiles = []
    for exponent in np.linspace(0.5, 2.2, _TILES):
        spectrum = np.fft.rfft2(rng.normal(size=(_TILE, _TILE))) / frequency**exponent
        spectrum[0, 0] = 0
        tile = np.fft.irfft2(spectrum, s=(_TILE, _TILE))
        tiles.append(tile / tile.std())
    return np.stack(tiles).astype(np.float32)


def _noise(rng: Random, height: int, width: int, zoom: float, *, smoothest: bool = False) -> NDArray[np.float32]:
    """A piece of 1/f noise, H x W; larger zooms show finer grain."""
    tile = _noise_tiles()[rng.integers(_TILES - 3, _TILES) if smoothest else rng.integers(_TILES - 4)]
    side = int(np.clip(max(height, width) * zoom, 4, _TILE))
    y, x = rng.integers(0, _TILE - side + 1, 2)
    piece = tile[y : y + side, x : x + side]
    piece = piece.T if rng.random() < 0.5 else piece
    return np.asarray(cv2.resize(piece, (width, height), interpolation=cv2.INTER_LINEAR), np.float32)


def _photographed(rng: Random, pixels: Surface) -> Rgb:
    """What a camera makes of the scene: light, blur, noise, JPEG."""
    size = len(pixels)
    if rng.random() < 0.5:
        light = 1 + rng.uniform(0.05, 0.3) * _noise(rng, size, size, rng.uniform(0.05, 0.2))
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
