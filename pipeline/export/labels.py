"""Pictures of numbers: each pixel says which mask it belongs to."""

import io

import numpy as np
from numpy.typing import DTypeLike, NDArray
from PIL import Image

from pipeline.contents import Row
from pipeline.curation.config import Priority
from pipeline.curation.filters import Record
from pipeline.curation.flatten import flattened
from pipeline.rle import runs


def labelled(row: Row, priority: Priority, dtype: DTypeLike) -> tuple[list[Record], NDArray[np.integer]]:
    """A row's masks made a partition, some of them perhaps empty now, and the picture of their numbers.

    Args:
        row: Of a masks dataset, with a size.
        priority: As `flattened` takes it.
        dtype: As `labels_of` takes it.
    """
    masks = flattened(row["masks"], priority)
    return masks, labels_of(masks, (row["height"], row["width"]), dtype)


def hidden(image_id: int, masks: list[Record]) -> list[tuple[str, str]]:
    """Which masks of a partition have no pixel: why each is left out, and what it is."""
    return [
        ("mask without a pixel of its own", f"image {image_id}, mask {place}")
        for place, mask in enumerate(masks)
        if not mask["area"]
    ]


def name_of(row: Row) -> str:
    """`000000000042.png`: the picture of image 42."""
    return f"{row['image_id']:012d}.png"


def labels_of(masks: list[Record], size: tuple[int, int], dtype: DTypeLike) -> NDArray[np.integer]:
    """Height x width: 0 where no mask is, else a mask's place in the list plus 1.

    It is laid out once from the runs of all masks.

    Args:
        masks: Without overlap; some may be empty.
        size: The image's height and width.
        dtype: Of the labels; must hold their number.
    """
    starts, lengths, labels = [], [], []
    for label, mask in enumerate(masks, 1):
        if not mask["area"]:
            continue
        counts = runs(mask["segmentation"]["counts"])
        starts.append(np.cumsum(counts)[: 2 * (len(counts) // 2) : 2])
        lengths.append(counts[1::2])
        labels.append(np.full(len(counts) // 2, label))
    empty = np.zeros(0, np.int64)
    starts_n, lengths_n, labels_n = (np.concatenate([empty, *parts]) for parts in (starts, lengths, labels))
    order = np.argsort(starts_n, kind="stable")
    starts_n, lengths_n, labels_n = starts_n[order], lengths_n[order], labels_n[order]
    gaps_n = np.diff(np.concatenate([[0], starts_n])) - np.concatenate([[0], lengths_n])[: len(starts_n)]
    height, width = size
    all_runs = np.concatenate([np.stack([gaps_n, lengths_n], 1).ravel(), [0]])
    all_runs[-1] = height * width - all_runs.sum()
    values = np.concatenate([np.stack([np.zeros_like(labels_n), labels_n], 1).ravel(), [0]]).astype(dtype)
    return np.repeat(values, all_runs).reshape(width, height).T


def png_of(picture: NDArray[np.uint8] | NDArray[np.uint16]) -> bytes:
    """A picture as a PNG file: H x W of uint16 or H x W x 3 of uint8."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(file, "PNG")
    return file.getvalue()
