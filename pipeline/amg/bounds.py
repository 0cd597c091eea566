"""Where a mask's box lies, told by its low-resolution logits alone, for certain if not to the pixel.

A pixel at full size is a weighted mean of at most p x p neighbouring low-resolution logits, its taps. It is in
the mask only if one of them is positive, and surely if all are. So the box of all pixels with a positive tap, the
outer one, holds the mask's box, and the box of all pixels with positive taps only, the inner one, is held by it.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Final, NamedTuple

import torch

from pipeline.amg.resize import resize_matrix
from pipeline.model.sam import MASK_THRESHOLD, Embedding

_NO_BOX: Final = -1
_FAR: Final = torch.iinfo(torch.int64).max
_ROUNDING: Final = 1e-6  # of a box IoU in float32


class Bounds(NamedTuple):
    """Of K masks' boxes, int64; boxes as of `pipeline.amg.measure`."""

    inner_K4_xyxy: torch.Tensor
    """0, 0, -1, -1 where no pixel is certain."""
    outer_K4_xyxy: torch.Tensor
    """0, 0, 0, 0 where no pixel is possible: the mask is empty, and this is its box."""


@dataclass(frozen=True)
class _Line:
    """One axis of an image: what S logits, or S - p + 1 runs of p logits, say of its pixels."""

    taps: int
    """p"""
    touched_2S: torch.Tensor
    """First and last pixel that has this logit as a tap; a large number and -1 where none has."""
    ruled_2r: torch.Tensor
    """First and last pixel that has all its taps in this run; a large number and -1 where none has."""


def bounds(logits_KSS: torch.Tensor, embedding: Embedding, image_size: int) -> Bounds:
    """Bounds of each mask's box.

    Args:
        logits_KSS: Low-resolution masks of one crop, float32.
        embedding: The encoded crop.
        image_size: The model's, in pixels.
    """
    height, width = embedding.original_size
    input_height, input_width = embedding.input_size
    rows = _line(image_size, input_height, height, logits_KSS.device)
    columns = _line(image_size, input_width, width, logits_KSS.device)
    positive_KSS = logits_KSS > MASK_THRESHOLD
    inner = _box(_runs(_runs(positive_KSS, rows.taps, 1), columns.taps, 2), rows.ruled_2r, columns.ruled_2r)
    outer = _box(positive_KSS, rows.touched_2S, columns.touched_2S)
    return Bounds(inner, outer.where(outer[:, 3:] != _NO_BOX, 0))


def surely_overlap(boxes_N4_xyxy: torch.Tensor, others: Bounds, box_iou: float) -> torch.Tensor:
    """Which of K others overlap one of N boxes by more than `box_iou`, whatever their boxes turn out to be.

    Args:
        boxes_N4_xyxy: int64.
        others: Bounds of the K others.
        box_iou: 0 to 1.

    Returns:
        bool K.
    """
    boxes_N14 = boxes_N4_xyxy[:, None]
    low_NK2 = torch.maximum(boxes_N14[..., :2], others.inner_K4_xyxy[:, :2])
    high_NK2 = torch.minimum(boxes_N14[..., 2:], others.inner_K4_xyxy[:, 2:])
    least_NK = (high_NK2 - low_NK2).clamp(min=0).prod(2)
    most_NK = _area(boxes_N14) + _area(others.outer_K4_xyxy) - least_NK
    return (least_NK / most_NK > box_iou + _ROUNDING).any(0)


def _area(boxes_xyxy: torch.Tensor) -> torch.Tensor:
    """As box IoU counts it: without the last row and column."""
    return (boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]).prod(-1)


def _runs(positive: torch.Tensor, length: int, dim: int) -> torch.Tensor:
    """Where a run of so many true values begins."""
    count = positive.shape[dim] - length + 1
    runs = positive.narrow(dim, 0, count)
    for offset in range(1, length):
        runs = runs & positive.narrow(dim, offset, count)
    return runs


def _box(where_Kij: torch.Tensor, rows_2i: torch.Tensor, columns_2j: torch.Tensor) -> torch.Tensor:
    """Box of the pixels that true values speak of; 0, 0, -1, -1 where there are none."""
    speaks_ij = (rows_2i[1] >= 0)[:, None] & (columns_2j[1] >= 0)
    bytes_Kij = (where_Kij & speaks_ij).view(torch.uint8)
    ends = []
    for places_2n, occupied_Kn in ((columns_2j, bytes_Kij.amax(1)), (rows_2i, bytes_Kij.amax(2))):
        some_Kn = occupied_Kn.bool()
        first_K = torch.where(some_Kn, places_2n[0], _FAR).amin(1)
        last_K = torch.where(some_Kn, places_2n[1], _NO_BOX).amax(1)
        ends.append((torch.where(last_K < 0, 0, first_K), last_K))
    (left, right), (top, bottom) = ends
    return torch.stack([left, top, right, bottom], dim=1)


@lru_cache(maxsize=16)
def _line(image_size: int, input_length: int, length: int, device: torch.device) -> _Line:
    used_nS = resize_matrix(image_size, input_length, length) != 0
    logits = torch.arange(used_nS.shape[1])
    first_n = torch.where(used_nS, logits, _FAR).amin(1)
    last_n = torch.where(used_nS, logits, -1).amax(1)
    taps = int((last_n - first_n).max()) + 1
    runs_r1 = torch.arange(used_nS.shape[1] - taps + 1)[:, None]
    ruled_rn = (first_n >= runs_r1) & (last_n < runs_r1 + taps)
    touched_Sn = (first_n <= logits[:, None]) & (logits[:, None] <= last_n)
    return _Line(taps, *(_ends(table).to(device) for table in (touched_Sn, ruled_rn)))


def _ends(table_in: torch.Tensor) -> torch.Tensor:
    """First and last true place in each row, 2 x i."""
    places_n = torch.arange(table_in.shape[1])
    return torch.stack(
        [torch.where(table_in, places_n, _FAR).amin(1), torch.where(table_in, places_n, _NO_BOX).amax(1)]
    )
