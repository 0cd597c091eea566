"""Surfaces of synthetic scenes: 1/f noise, patterns, gradients, pieces of photographs, in colours as in nature."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

Rgb = NDArray[np.uint8]
Surface = NDArray[np.float32]
"""H x W x 3, 0 to 255."""
Random = np.random.Generator

_TILE: Final = 512
_TILES: Final = 12


def random_surface(rng: Random, height: int, width: int, photographs: Sequence[Rgb]) -> Surface:
    """A surface of one material, float32 H x W x 3, 0 to 255.

    Args:
        rng: Decides everything.
        height: In pixels.
        width: In pixels.
        photographs: uint8 RGB pictures, whose pieces make up half of the surfaces if there are any.
    """
    if len(photographs) and rng.random() < 0.5:
        return _piece_of_photograph(rng, height, width, photographs[int(rng.integers(len(photographs)))])
    colour = _colour(rng)
    surface = np.broadcast_to(colour, (height, width, 3)).astype(np.float32)
    kind = rng.random()
    if kind < 0.65:
        rough = noise(rng, height, width, rng.uniform(0.5, 2))
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
    bend = noise(rng, height, width, 0.5) * rng.uniform(0, 0.6)
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


def noise(rng: Random, height: int, width: int, zoom: float, *, smoothest: bool = False) -> NDArray[np.float32]:
    """A piece of 1/f noise of mean 0 and deviation 1 over many, float32 H x W; larger zooms show finer grain."""
    tile = _noise_tiles()[rng.integers(_TILES - 3, _TILES) if smoothest else rng.integers(_TILES - 4)]
    side = int(np.clip(max(height, width) * zoom, 4, _TILE))
    y, x = rng.integers(0, _TILE - side + 1, 2)
    piece = tile[y : y + side, x : x + side]
    piece = piece.T if rng.random() < 0.5 else piece
    return np.asarray(cv2.resize(piece, (width, height), interpolation=cv2.INTER_LINEAR), np.float32)
