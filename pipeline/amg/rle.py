"""COCO run-length encoding, by pycocotools."""

from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco


class Rle(TypedDict):
    """A mask as compressed COCO RLE."""

    size: list[int]
    """Height and width."""
    counts: str


def encode_in_image(masks_KWH: torch.Tensor, crop_box_xyxy: list[int], image_size: tuple[int, int]) -> list[Rle]:
    """Encode a crop's masks as masks of the whole image.

    Args:
        masks_KWH: Bool masks of the crop, transposed.
        crop_box_xyxy: Where the crop lies in the image.
        image_size: The image's height and width.
    """
    height, width = image_size
    left, top, right, bottom = crop_box_xyxy
    masks = masks_KWH.view(torch.uint8).cpu().numpy()
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


def area(rle: Rle) -> int:
    """Pixels in the mask."""
    return int(coco.area(rle))


def covered(rles: Sequence[Rle]) -> int:
    """Pixels in any of an image's masks, without decoding them."""
    return int(coco.area(coco.merge(rles))) if rles else 0


def uncompressed(rle: Rle) -> dict[str, Any]:
    """The same with `counts` as a list: lengths of alternating runs down the columns, background first."""
    pixels = decode(rle).ravel(order="F")
    changes = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    counts = np.diff([0, *changes, pixels.size]).tolist()
    return {"size": rle["size"], "counts": [0, *counts] if pixels[0] else counts}


def _text(rle: dict[str, Any]) -> Rle:
    return {"size": rle["size"], "counts": rle["counts"].decode("ascii")}
