"""Masks at full size as COCO RLE, their runs found where the masks are: a GPU's need not come to the host."""

from typing import Final

import numpy as np
import torch

from pipeline import rle

_PIXELS_AT_ONCE: Final = 2**31 - 1  # that `torch.nonzero` can index on CUDA


def encode_in_image(
    masks_KWH: torch.Tensor, crop_box_xyxy: list[int], image_size: tuple[int, int]
) -> list[rle.Rle]:
    """What `rle.encode_in_image` makes of the same masks, on any device.

    Args:
        masks_KWH: Bool masks of the crop, transposed.
        crop_box_xyxy: Where the crop lies in the image.
        image_size: The image's height and width.
    """
    if masks_KWH.device.type != "cuda" or masks_KWH.shape[:0:-1] != image_size:
        return rle.encode_in_image(masks_KWH.cpu().numpy(), crop_box_xyxy, image_size)
    return encode_by_runs(masks_KWH)


def encode_by_runs(masks_KWH: torch.Tensor) -> list[rle.Rle]:
    """Each mask from the places where it changes, down the columns.

    Args:
        masks_KWH: Bool masks, transposed, on any device.
    """
    width, height = masks_KWH.shape[1:]
    pixels = width * height
    encoded = []
    for few_KWH in torch.split(masks_KWH, max(1, _PIXELS_AT_ONCE // pixels)):
        masks_KP = few_KWH.flatten(1)
        mask_E, last_E = (masks_KP[:, 1:] != masks_KP[:, :-1]).nonzero().cpu().numpy().T
        ends = np.split(last_E + 1, np.searchsorted(mask_E, np.arange(len(masks_KP))))[1:]
        for begins_inside, ends_of_runs in zip(masks_KP[:, 0].tolist(), ends, strict=True):
            lengths = np.diff(ends_of_runs, prepend=0, append=pixels).tolist()
            encoded.append(rle.compressed([0, *lengths] if begins_inside else lengths, (height, width)))
    return encoded
