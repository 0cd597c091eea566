"""From low-resolution logits to masks at the crop's size, in pieces that fit a byte budget.

SAM upsamples bilinearly twice: S/4 x S/4 to S x S, cuts the padding off, then to the crop's H x W. Both steps
are linear and separable, so together they are one matrix for the rows and one for the columns, with at most
four taps a line. Only a strip of columns is float at a time, and a mask is laid out column by column, as
RLE is.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Final, NamedTuple

import torch
from torch.nn import functional as F

from pipeline.model.sam import MASK_THRESHOLD, Embedding

_STRIP_ELEMENTS: Final = 2**20  # float32s of a strip: stays in a CPU's cache, fills a GPU well enough
_MASKS_AT_ONCE: Final = 64


class Measured(NamedTuple):
    """What the filters need to know of K masks at full size."""

    stability_score_K: torch.Tensor
    boxes_K4_xyxy: torch.Tensor


class MaskResizer:
    """Resizes the masks of one crop, whose height and width are `height` and `width`."""

    def __init__(self, embedding: Embedding, image_size: int, memory_budget: int) -> None:
        """Prepare for one encoded crop.

        Args:
            embedding: The encoded crop.
            image_size: The model's, in pixels.
            memory_budget: Bytes to stay under; one mask at a time is the least.
        """
        device = embedding.features_1CHW.device
        self.height, self.width = embedding.original_size
        input_height, input_width = embedding.input_size
        self._rows = _resize_matrix(image_size, input_height, self.height).to(device)
        columns = _resize_matrix(image_size, input_width, self.width)
        self._first_tap, self._last_tap = (taps.tolist() for taps in _span(columns != 0))
        self._columns = columns.to(device)
        self._memory_budget = memory_budget

    def measure(self, logits_KSS: torch.Tensor, offset: float) -> Measured:
        """Stability score and box of each mask.

        The stability score is the area above the threshold + offset over the area above the threshold -
        offset, NaN where that is empty. A box is the mask's first column and row and its last column and
        row; zeros for an empty mask.
        """
        device, count = logits_KSS.device, len(logits_KSS)
        inner, outer = (torch.zeros(count, dtype=torch.int64, device=device) for _ in range(2))
        in_column = torch.zeros(count, self.width, dtype=torch.bool, device=device)
        in_row = torch.zeros(count, self.height, dtype=torch.bool, device=device)
        step = self._masks_at_once(kept_bytes=0)
        for i in range(0, count, step):
            chunk = slice(i, i + step)
            for columns, strip in self._strips(logits_KSS[chunk]):
                inner[chunk] += (strip > MASK_THRESHOLD + offset).sum((1, 2))
                outer[chunk] += (strip > MASK_THRESHOLD - offset).sum((1, 2))
                inside = strip > MASK_THRESHOLD
                in_column[chunk, columns] = inside.any(2)
                in_row[chunk] |= inside.any(1)
        (left, right), (top, bottom) = _span(in_column), _span(in_row)
        boxes = torch.stack([left, top, right, bottom], dim=1)
        return Measured(inner / outer, boxes * in_row.any(1, keepdim=True))

    def masks(self, logits_KSS: torch.Tensor) -> Iterator[torch.Tensor]:
        """The masks, as many at a time as the budget allows.

        Yields:
            bool k x W x H: transposed, so that a mask is contiguous column by column.
        """
        step = self._masks_at_once(kept_bytes=self.width * self.height)
        for i in range(0, len(logits_KSS), step):
            chunk = logits_KSS[i : i + step]
            masks = torch.empty(len(chunk), self.width, self.height, dtype=torch.bool, device=chunk.device)
            for columns, strip in self._strips(chunk):
                masks[:, columns] = strip > MASK_THRESHOLD
            yield masks

    def _strips(self, logits_KSS: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Runs of columns and their logits, K x columns x H."""
        tall = logits_KSS.transpose(1, 2) @ self._rows.T
        step = max(1, _STRIP_ELEMENTS // (len(logits_KSS) * self.height))
        for start in range(0, self.width, step):
            stop = min(start + step, self.width)
            taps = slice(self._first_tap[start], self._last_tap[stop - 1] + 1)
            yield slice(start, stop), self._columns[start:stop, taps] @ tall[:, taps]

    def _masks_at_once(self, kept_bytes: int) -> int:
        """How many masks fit, when `kept_bytes` of each outlive its strips."""
        float_bytes = self._rows.element_size() * self.height * self._columns.shape[1]
        return min(_MASKS_AT_ONCE, max(1, self._memory_budget // (float_bytes + kept_bytes)))


@lru_cache(maxsize=16)
def _resize_matrix(image_size: int, input_length: int, length: int) -> torch.Tensor:
    """Weights length x image_size/4 of both resizes along one axis."""
    to_model = _interpolation(image_size // 4, image_size)[:input_length]
    return (_interpolation(input_length, length) @ to_model).float()


def _interpolation(source: int, target: int) -> torch.Tensor:
    """PyTorch's own bilinear weights, target x source: what it makes of unit vectors."""
    units = torch.eye(source)[None]
    return F.interpolate(units, size=target, mode="linear", align_corners=False)[0].T.double()


def _span(occupied_KN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """First and last index of each row's true values."""
    occupied = occupied_KN.byte()
    return occupied.argmax(1), occupied.shape[1] - 1 - occupied.flip(1).argmax(1)
