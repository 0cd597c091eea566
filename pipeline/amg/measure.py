"""Stability score and box of masks at full size, without making what is not in doubt.

A pixel at full size is a weighted mean of at most 4 x 4 low-resolution logits. Where all of these are above the
thresholds, so is the pixel, and where all are below, so is it. So an image is cut into tiles, minimum and maximum
of each tile's logits are found, and only tiles in doubt, mostly those on a mask's outline, are resized.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Final, NamedTuple

import torch

from pipeline.amg.resize import resize_matrix
from pipeline.model.sam import MASK_THRESHOLD, Embedding

_TILE: Final = 32  # pixels on a side at least: small ones make more bookkeeping, large ones more pixels in doubt
_TILES: Final = 64  # along the longer side at most
_MASKS_AT_ONCE: Final = 64
_PIXELS_AT_ONCE: Final = 2**18  # of tiles in doubt, as float32: stays in a CPU's cache, fills a GPU well enough
_ROUNDING: Final = 1e-5  # of a mask's largest logit: what resizing may be off by, generously


class Measured(NamedTuple):
    """What the filters need to know of K masks at full size."""

    stability_score_K: torch.Tensor
    boxes_K4_xyxy: torch.Tensor


@dataclass(frozen=True)
class _Axis:
    """One axis of an image, cut into n tiles of s pixels, the last perhaps shorter."""

    edges: torch.Tensor
    """n + 1: first pixel of each tile, and the length."""
    taps_np: torch.Tensor
    """The p logits that a tile's pixels are made of."""
    weights_nsp: torch.Tensor
    """Of these logits; zeros for the pixels that a short tile lacks."""

    def __len__(self) -> int:
        return len(self.taps_np)


def measure(logits_KSS: torch.Tensor, embedding: Embedding, image_size: int, offset: float) -> Measured:
    """Stability score and box of each mask.

    The stability score is the area above the threshold + offset over the area above the threshold - offset, NaN
    where that is empty. A box is the mask's first column and row and its last column and row; zeros for an empty
    mask.

    Args:
        logits_KSS: Low-resolution masks of one crop, float32.
        embedding: The encoded crop.
        image_size: The model's, in pixels.
        offset: Of the stability score.
    """
    height, width = embedding.original_size
    input_height, input_width = embedding.input_size
    step = max(_TILE, -(-max(height, width) // _TILES))
    device = logits_KSS.device
    rows = _axis(image_size, input_height, height, step, device)
    columns = _axis(image_size, input_width, width, step, device)
    parts = [_measure(few, rows, columns, offset) for few in torch.split(logits_KSS, _MASKS_AT_ONCE)]
    return Measured(*(torch.cat(fields) for fields in zip(*parts, strict=True)))


def _measure(logits_KSS: torch.Tensor, rows: _Axis, columns: _Axis, offset: float) -> Measured:
    above, below = MASK_THRESHOLD + offset, MASK_THRESHOLD - offset
    rounding_K11 = _ROUNDING * logits_KSS.abs().amax((1, 2), keepdim=True)
    low_Kij, high_Kij = _extrema(logits_KSS, rows, columns)
    inside_Kij = low_Kij - rounding_K11 > max(above, below, MASK_THRESHOLD)
    outside_Kij = high_Kij + rounding_K11 <= min(above, below, MASK_THRESHOLD)
    area_ij = rows.edges.diff()[:, None] * columns.edges.diff()
    certain_K = (inside_Kij * area_ij).sum((1, 2))
    inner_K, outer_K = certain_K, certain_K.clone()
    top_K, bottom_K = _ends(inside_Kij.any(2), rows.edges[:-1], rows.edges[1:] - 1)
    left_K, right_K = _ends(inside_Kij.any(1), columns.edges[:-1], columns.edges[1:] - 1)
    for masks_M, y_Ms, x_t, values_Mst in _resized(logits_KSS, ~(inside_Kij | outside_Kij), rows, columns):
        inner_K.index_add_(0, masks_M, _count(values_Mst > above))
        outer_K.index_add_(0, masks_M, _count(values_Mst > below))
        top_M, bottom_M = _ends(values_Mst.amax(2) > MASK_THRESHOLD, y_Ms, y_Ms)
        left_M, right_M = _ends(values_Mst.amax(1) > MASK_THRESHOLD, x_t, x_t)
        top_K.scatter_reduce_(0, masks_M, top_M, "amin")
        left_K.scatter_reduce_(0, masks_M, left_M, "amin")
        bottom_K.scatter_reduce_(0, masks_M, bottom_M, "amax")
        right_K.scatter_reduce_(0, masks_M, right_M, "amax")
    boxes_K4 = torch.stack([left_K, top_K, right_K, bottom_K], dim=1)
    return Measured(inner_K / outer_K, boxes_K4 * (bottom_K >= 0)[:, None])


def _resized(
    logits_KSS: torch.Tensor, wanted_Kij: torch.Tensor, rows: _Axis, columns: _Axis
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The wanted tiles at full size, M at a time of one column.

    Yields:
        Each tile's mask M, the y of its s rows M x s, the x of its t columns t, its logits M x s x t, which are
        -inf where there is no pixel.
    """
    size = rows.weights_nsp.shape[1]
    in_last_row = int(rows.edges[-1] - rows.edges[-2])
    edges = columns.edges.tolist()
    for j in range(len(columns)):
        x_t = torch.arange(edges[j], edges[j + 1], device=logits_KSS.device)
        across_KSt = logits_KSS[:, :, columns.taps_np[j]] @ columns.weights_nsp[j, : len(x_t)].T
        some = max(1, _PIXELS_AT_ONCE // (size * len(x_t)))
        for pairs_M2 in torch.split(wanted_Kij[:, :, j].nonzero(), some):
            masks_M, i_M = pairs_M2.unbind(1)
            across_Mpt = across_KSt[masks_M[:, None], rows.taps_np[i_M]]
            values_Mst = torch.bmm(rows.weights_nsp[i_M], across_Mpt)
            if in_last_row < size:
                values_Mst[i_M == len(rows) - 1, in_last_row:] = -torch.inf
            yield masks_M, rows.edges[i_M][:, None] + torch.arange(size, device=i_M.device), x_t, values_Mst


def _extrema(logits_KSS: torch.Tensor, rows: _Axis, columns: _Axis) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest logit of each tile, K x i x j."""
    by_tap = [logits_KSS[:, taps_i] for taps_i in rows.taps_np.T]
    low_KiS, high_KiS = (reduce(choose, by_tap) for choose in (torch.minimum, torch.maximum))
    return low_KiS[:, :, columns.taps_np].amin(3), high_KiS[:, :, columns.taps_np].amax(3)


def _count(where_Mst: torch.Tensor) -> torch.Tensor:
    """Of the true values of each."""
    return where_Mst.flatten(1).view(torch.uint8).sum(1)


def _ends(
    occupied_Mn: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest start and largest end of the occupied ones in each row; a large number and -1 if there are none."""
    first = torch.where(occupied_Mn, starts, torch.iinfo(torch.int64).max).amin(1)
    return first, torch.where(occupied_Mn, ends, -1).amax(1)


@lru_cache(maxsize=16)
def _axis(image_size: int, input_length: int, length: int, step: int, device: torch.device) -> _Axis:
    weights = resize_matrix(image_size, input_length, length)
    tiles = torch.split(weights, step)
    spans = [tile.any(0).nonzero()[:, 0] for tile in tiles]
    taps = max(int(span[-1] - span[0]) + 1 for span in spans)
    first_n = torch.stack([span[0] for span in spans]).clamp(max=weights.shape[1] - taps)
    taps_np = first_n[:, None] + torch.arange(taps)
    weights_nsp = torch.zeros(len(tiles), min(step, length), taps)
    for i, tile in enumerate(tiles):
        weights_nsp[i, : len(tile)] = tile[:, taps_np[i]]
    edges = torch.tensor([*range(0, length, step), length])
    return _Axis(edges.to(device), taps_np.to(device), weights_nsp.to(device))
