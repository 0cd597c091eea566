"""From low-resolution logits to masks at the crop's size, in pieces that fit a byte budget.

SAM upsamples bilinearly twice: S/4 x S/4 to S x S, cuts the padding off, then to the crop's H x W. Both steps
are linear and separable, so together they are one matrix for the rows and one for the columns, with at most
four taps a line. Only a strip of columns is float at a time, and a mask is laid out column by column, as
RLE is.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Final

import torch
from torch.nn import functional as F

from pipeline.model.sam import MASK_THRESHOLD, Embedding

_STRIP_ELEMENTS: Final = 2**20  # float32s of a strip: stays in a CPU's cache, fills a GPU well enough
_MASKS_AT_ONCE: Final = 64


def full_size_masks(
    logits_KSS: torch.Tensor, embedding: Embedding, image_size: int, memory_budget: int
) -> Iterator[torch.Tensor]:
    """The masks of one crop at its size H x W, as many at a time as the budget allows.

    Args:
        logits_KSS: Low-resolution masks, float32.
        embedding: The encoded crop.
        image_size: The model's, in pixels.
        memory_budget: Bytes to stay under; one mask at a time is the least.

    Yields:
        bool k x W x H: transposed, so that a mask is contiguous column by column.
    """
    device, side = logits_KSS.device, logits_KSS.shape[2]
    height, width = embedding.original_size
    input_height, input_width = embedding.input_size
    rows_HS = resize_matrix(image_size, input_height, height).to(device)
    columns_WS = resize_matrix(image_size, input_width, width)
    taps = [used.nonzero()[:, 0] for used in columns_WS != 0]
    columns_WS = columns_WS.to(device)
    one_mask = width * height + rows_HS.element_size() * height * side
    some = min(_MASKS_AT_ONCE, max(1, memory_budget // one_mask))
    for first in range(0, len(logits_KSS), some):
        few_kSS = logits_KSS[first : first + some]
        tall_kSH = few_kSS.transpose(1, 2) @ rows_HS.T
        masks_kWH = torch.empty(len(few_kSS), width, height, dtype=torch.bool, device=device)
        step = max(1, _STRIP_ELEMENTS // (len(few_kSS) * height))
        for start in range(0, width, step):
            strip = slice(start, min(start + step, width))
            used = slice(int(taps[strip.start][0]), int(taps[strip.stop - 1][-1]) + 1)
            masks_kWH[:, strip] = columns_WS[strip, used] @ tall_kSH[:, used] > MASK_THRESHOLD
        yield masks_kWH


@lru_cache(maxsize=16)
def resize_matrix(image_size: int, input_length: int, length: int) -> torch.Tensor:
    """Weights length x image_size/4 of both resizes along one axis."""
    to_model = _interpolation(image_size // 4, image_size)[:input_length]
    return (_interpolation(input_length, length) @ to_model).float()


def _interpolation(source: int, target: int) -> torch.Tensor:
    """PyTorch's own bilinear weights, target x source: what it makes of unit vectors."""
    units = torch.eye(source)[None]
    return F.interpolate(units, size=target, mode="linear", align_corners=False)[0].T.double()
