"""COCO run-length encoding, by pycocotools."""

from collections.abc import Sequence
from typing import Any, Final, TypedDict

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco

_DIGITS: Final = 8
"""Characters a run may have: 40 bits."""


class Rle(TypedDict):
    """A mask as compressed COCO RLE."""

    size: list[int]
    """Height and width."""
    counts: str


def encode_in_image(
    masks_KWH: NDArray[np.bool_], crop_box_xyxy: list[int], image_size: tuple[int, int]
) -> list[Rle]:
    """Encode a crop's masks as masks of the whole image.

    Args:
        masks_KWH: Bool masks of the crop, transposed.
        crop_box_xyxy: Where the crop lies in the image.
        image_size: The image's height and width.
    """
    height, width = image_size
    left, top, right, bottom = crop_box_xyxy
    masks = masks_KWH.view(np.uint8)
    # The transpose of a C-contiguous K x W x H is the Fortran-ordered H x W x K that pycocotools reads.
    if masks.shape[1:] == (width, height):
        return [_text(rle) for rle in coco.encode(masks.transpose(2, 1, 0))]
    canvas = np.zeros((width, height), dtype=np.uint8)  # one for all: the budget is of masks of the crop's size
    rles = []
    for mask_WH in masks:
        canvas[left:right, top:bottom] = mask_WH
        rles.append(_text(coco.encode(canvas.T)))
    return rles


def encode(mask_HW: NDArray[np.bool_]) -> Rle:
    """Encode one mask."""
    return _text(coco.encode(np.asfortranarray(mask_HW, dtype=np.uint8)))


def decode(rle: Rle) -> NDArray[np.bool_]:
    """The mask H x W of an RLE."""
    decoded: NDArray[np.uint8] = coco.decode(rle)
    return decoded.view(np.bool_)


def union(rles: Sequence[Rle]) -> Rle:
    """The pixels that are in at least one of some masks of one image, from their runs alone."""
    return _text(coco.merge(list(rles)))


def covered(rles: Sequence[Rle]) -> int:
    """Pixels in at least one of an image's masks, from their runs alone."""
    return area(union(rles)) if rles else 0


def decode_all(rles: list[Rle], size: tuple[int, int]) -> NDArray[np.bool_]:
    """The masks N x H x W of N RLEs of one image, whose height and width are `size`."""
    if not rles:
        return np.zeros((0, *size), np.bool_)
    masks_NHW: NDArray[np.bool_] = np.ascontiguousarray(coco.decode(rles).transpose(2, 0, 1)).view(np.bool_)
    return masks_NHW


def area(rle: Rle) -> int:
    """Pixels in the mask."""
    return int(coco.area(rle))


def areas(rles: Sequence[Rle]) -> NDArray[np.int64]:
    """Pixels in each of N masks. pycocotools' own takes 255 at most."""
    return np.array([area(rle) for rle in rles], np.int64)


def is_whole(rle: Rle) -> bool:
    """Whether the runs fill the mask. pycocotools decodes what is left of it to whatever was in memory."""
    try:
        lengths = runs(rle["counts"])
    except ValueError:
        return False
    return bool((lengths >= 0).all()) and int(lengths.sum()) == rle["size"][0] * rle["size"][1]


def runs(counts: str) -> NDArray[np.int64]:
    """Lengths of alternating runs down the columns, background first, of compressed counts.

    As `rleFrString` of pycocotools: five bits a character, the lowest first; from the third run on the difference
    to the last but one.

    Raises:
        ValueError: a character that is none of these, or a number without end.
    """
    codes = np.frombuffer(counts.encode("ascii"), np.uint8).astype(np.int64) - ord("0")
    ends = np.flatnonzero((codes & 0x20) == 0)
    if not len(codes) or codes.min() < 0 or codes.max() > 0x3F or ends[-1:] != len(codes) - 1:
        raise ValueError(f"no compressed counts: {counts[:20]!r}")
    digits = np.diff(ends, prepend=-1)
    if digits.max() > _DIGITS:
        raise ValueError(f"a run that is too long: {counts[:20]!r}")
    starts = ends - digits + 1
    place = np.arange(len(codes)) - np.repeat(starts, digits)
    lengths: NDArray[np.int64] = np.add.reduceat((codes & 0x1F) << (5 * place), starts)
    lengths -= ((codes[ends] & 0x10) > 0) * (np.int64(1) << (5 * digits))
    lengths[1::2] = np.cumsum(lengths[1::2])
    lengths[2::2] = np.cumsum(lengths[2::2])
    return lengths


def uncompressed(rle: Rle) -> dict[str, Any]:
    """The same with `counts` as a list: lengths of alternating runs down the columns, background first."""
    pixels = decode(rle).ravel(order="F")
    changes = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    counts = np.diff([0, *changes, pixels.size]).tolist()
    return {"size": rle["size"], "counts": [0, *counts] if pixels[0] else counts}


def compressed(lengths: list[int], size: tuple[int, int]) -> Rle:
    """Undo `uncompressed`: from lengths of runs, and the mask's height and width."""
    return _text(coco.frPyObjects({"size": list(size), "counts": lengths}, *size))


def _text(rle: dict[str, Any]) -> Rle:
    return {"size": rle["size"], "counts": rle["counts"].decode("ascii")}
