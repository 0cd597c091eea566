"""Training examples: pictures with masks, cut and turned, and clicks on them. Everything follows from a seed.

A batch is made from its number alone, so a training that is killed goes on with the batches it would have had.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.errors import TrainingDataError
from pipeline.training import bsds
from pipeline.training.scenes import scene

Rgb = NDArray[np.uint8]
Random = np.random.Generator
_SMALLEST: Final = 1 / 1000  # of the picture; smaller segments are dropped
_USUAL: Final = 1 / 100  # of the picture: masks of that size are asked for most
_WHOLE: Final = 0.25  # of the examples show a picture's whole height, half of them its whole width too
_CAREFUL: Final = 0.5  # of the clicks are the innermost of some pixels of their mask, the others are any
_TRIES: Final = 16  # such pixels
_FRUITLESS: Final = 100  # draws one after another that give no mask
MASKS: Final = 64
"""Of a picture, at most."""


@dataclass(frozen=True)
class Example:
    """A picture and masks of things in it, which may overlap."""

    name: str
    rgb_HW3: Rgb
    masks_NHW: NDArray[np.bool_]
    part: float = 1.0
    """Its longer side as a share of that of a whole picture."""


Source = Callable[[Random], Example]
"""Draws an example."""


@dataclass(frozen=True)
class Batch:
    """B pictures of S x S with P prompts each."""

    names: tuple[str, ...]
    pixels_B3SS: torch.Tensor
    """uint8, RGB; right and below padded with the mean colour, which normalises to zero."""
    masks_BNss: torch.Tensor
    """uint8, 0 to 255: how much of each pixel of the low-resolution masks (s = S/4) each mask covers."""
    targets_BP: torch.Tensor
    """Which mask each prompt asks for."""
    points_BP2: torch.Tensor
    """x, y in pixels of the input, on that mask."""
    boxes_BP4: torch.Tensor
    """x0, y0, x1, y1 around that mask, a little off."""

    def to(self, device: torch.device) -> "Batch":
        """The same on another device."""
        tensors = (self.pixels_B3SS, self.masks_BNss, self.targets_BP, self.points_BP2, self.boxes_BP4)
        return Batch(self.names, *(tensor.to(device, non_blocking=True) for tensor in tensors))


def scene_source(size: int, seed: int, photographs: Sequence[Rgb] = (), part: float = 1.0) -> Source:
    """Synthetic scenes without end, each that part of a picture."""

    def draw(rng: Random) -> Example:
        index = int(rng.integers(2**40))
        made = scene(index, size, seed, photographs)
        return Example(f"scene {index} of seed {seed}", made.rgb_HW3, made.masks_NHW, part)

    return draw


def bsds_source(photographs: Sequence[bsds.Photograph]) -> Source:
    """Photographs of BSDS500, the segments of all their annotators together."""

    def draw(rng: Random) -> Example:
        photograph = photographs[int(rng.integers(len(photographs)))]
        masks = [bsds.segments(labels, _SMALLEST) for labels in photograph.label_maps_HW]
        return Example(photograph.name, photograph.rgb_HW3, np.concatenate(masks))

    return draw


def mixed(sources: Sequence[Source], shares: Sequence[float]) -> Source:
    """Draws from several sources, from each by its share."""
    parts = np.array(shares) / sum(shares)
    return lambda rng: sources[rng.choice(len(sources), p=parts)](rng)


class Batches(torch.utils.data.Dataset[Batch]):
    """Batches by number, for a `DataLoader` without batching of its own."""

    def __init__(
        self,
        source: Source,
        *,
        image_size: int,
        pictures: int,
        prompts: int,
        seed: int,
        natural_size: int | None = None,
    ) -> None:
        """Take a source.

        Args:
            source: Of examples.
            image_size: Side of the model's input, S.
            pictures: A batch, B.
            prompts: A picture, P.
            seed: Of everything that is drawn.
            natural_size: See `augmented`.
        """
        self._source, self._size, self._seed = source, image_size, seed
        self._natural_size = natural_size
        self._pictures, self._prompts = pictures, prompts

    def __getitem__(self, number: int) -> Batch:
        """The batch of that number, always the same.

        Raises:
            TrainingDataError: a hundred examples one after another have no mask that is large enough.
        """
        cv2.setNumThreads(1)
        rng = np.random.default_rng([self._seed, number])
        rows: list[tuple[Any, ...]] = []
        fruitless = 0
        while len(rows) < self._pictures:
            example = augmented(self._source(rng), self._size, rng, self._natural_size)
            if len(example.masks_NHW):
                rows.append((example.name, *with_prompts(example, self._prompts, rng)))
                fruitless = 0
                continue
            fruitless += 1
            if fruitless == _FRUITLESS:
                raise TrainingDataError(
                    f"{_FRUITLESS} examples one after another have no mask of at least {_SMALLEST:.1%} of what "
                    f"is cut from the picture, the last of them {example.name}."
                )
        names, *arrays = zip(*rows, strict=True)
        return Batch(tuple(names), *(torch.from_numpy(np.stack(column)) for column in arrays))


def augmented(example: Example, size: int, rng: Random, natural_size: int | None = None) -> Example:
    """A piece of a picture of any size, size x size, maybe mirrored, with other light and colours.

    Args:
        example: Where it is cut from.
        size: In pixels.
        rng: Decides.
        natural_size: What the longer side of a whole picture will be scaled to when masks are made, `size` by
            default. A smaller piece shows things about as large as they will be then, in fewer pixels.
    """
    rgb, masks = example.rgb_HW3, example.masks_NHW
    height, width = rgb.shape[:2]
    aspect = np.exp(rng.uniform(-0.25, 0.25))
    share = size / (natural_size or size) / example.part * np.exp(rng.uniform(-0.5, 0.5))
    share = 1.0 if rng.random() < _WHOLE else min(share, 1.0)
    cut_height = min(max(int(height * share), 16), height)
    cut_width = min(max(int(width * share * aspect), 16), width)
    y, x = int(rng.integers(0, height - cut_height + 1)), int(rng.integers(0, width - cut_width + 1))
    window = np.s_[y : y + cut_height, x : x + cut_width]
    masks = masks[(slice(None), *window)]
    masks = masks[masks.mean(axis=(1, 2)) >= _SMALLEST]
    if len(masks) > MASKS:
        masks = masks[np.sort(rng.choice(len(masks), MASKS, replace=False))]
    scale = size / max(cut_height, cut_width)
    new_width, new_height = max(1, round(cut_width * scale)), max(1, round(cut_height * scale))
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    rgb = _with_other_light(cv2.resize(rgb[window], (new_width, new_height), interpolation=method), rng)
    layers = [
        cv2.resize(mask.astype(np.uint8), (new_width, new_height), interpolation=cv2.INTER_NEAREST_EXACT)
        for mask in masks
    ]
    if rng.random() < 0.5:
        rgb, layers = rgb[:, ::-1], [layer[:, ::-1] for layer in layers]
    padded = np.empty((size, size, 3), np.uint8)
    padded[:] = _MEAN_COLOUR
    padded[:new_height, :new_width] = rgb
    padded_masks = np.zeros((len(layers), size, size), bool)
    for target, layer in zip(padded_masks, layers, strict=True):
        target[:new_height, :new_width] = layer
    return Example(example.name, padded, padded_masks[padded_masks.any(axis=(1, 2))])


_MEAN_COLOUR: Final = (124, 116, 104)


def _with_other_light(rgb_HW3: NDArray[Any], rng: Random) -> Rgb:
    values = np.arange(256, dtype=np.float32)
    gain, shift, gamma = rng.uniform(0.8, 1.25), rng.uniform(-20, 20), np.exp(rng.uniform(-0.25, 0.25))
    tables = [
        np.clip(255 * (np.clip(values * gain * rng.uniform(0.93, 1.07) + shift, 0, 255) / 255) ** gamma, 0, 255)
        for _ in range(3)
    ]
    table = np.stack(tables, axis=1).astype(np.uint8)[None]
    changed = np.asarray(cv2.LUT(np.ascontiguousarray(rgb_HW3), table), np.uint8)
    if rng.random() < 0.08:
        changed = np.repeat(changed.mean(axis=2, keepdims=True).astype(np.uint8), 3, axis=2)
    return changed


def with_prompts(example: Example, count: int, rng: Random) -> tuple[NDArray[np.generic], ...]:
    """The arrays of one row of a `Batch`, in its order.

    Masks of about a hundredth of the picture are asked for most: smaller ones are specks, and larger ones are
    learnt soon.
    """
    masks = example.masks_NHW
    areas = masks.mean(axis=(1, 2))
    weights = np.minimum(areas, _USUAL) / np.maximum(areas, _USUAL) ** 0.25
    targets = rng.choice(len(masks), count, p=weights / weights.sum())
    points, boxes = np.empty((count, 2), np.float32), np.empty((count, 4), np.float32)
    for i, mask in enumerate(masks[targets]):
        rows, columns = np.nonzero(mask)
        points[i] = _click(mask, rows, columns, rng)
        box = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], np.float32)
        sides = np.tile(box[2:] - box[:2], 2)
        boxes[i] = np.clip(box + np.clip(rng.normal(0, 0.1, 4), -0.2, 0.2) * sides, 0, masks.shape[1])
    side = masks.shape[1] // 4
    low = np.zeros((MASKS, side, side), np.uint8)
    for i, mask in enumerate(masks):
        low[i] = cv2.resize(mask.astype(np.uint8) * 255, (side, side), interpolation=cv2.INTER_AREA)
    pixels = np.ascontiguousarray(example.rgb_HW3.transpose(2, 0, 1))
    return pixels, low, targets.astype(np.int64), points, boxes


def _click(mask_HW: NDArray[np.bool_], rows: NDArray[Any], columns: NDArray[Any], rng: Random) -> tuple[int, int]:
    """A pixel x, y of a mask, whose pixels' rows and columns are given.

    People click in the middle of what they mean, and a grid's points fall anywhere: half of the clicks are like
    those, half like these.
    """
    picks = rng.integers(len(rows), size=_TRIES)
    pick = picks[0]
    if rng.random() < _CAREFUL:
        padded = np.pad(mask_HW.astype(np.uint8), 1)
        depth_HW = cv2.distanceTransform(padded, cv2.DIST_L2, 3)[1:-1, 1:-1]
        pick = picks[np.argmax(depth_HW[rows[picks], columns[picks]])]
    return columns[pick], rows[pick]
