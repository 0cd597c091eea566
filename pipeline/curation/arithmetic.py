"""Set arithmetic on masks as COCO RLE, by their runs: no mask is laid out as a whole picture.

What it costs goes with the number of runs, about two a column that a mask crosses.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco

from pipeline.rle import Rle, areas, runs

Counts = NDArray[np.int64]
"""Lengths of alternating runs down the columns, background first."""


def from_counts(counts: Counts, size: Sequence[int]) -> Rle:
    """Compress runs.

    Args:
        counts: Which sum up to the image's pixels.
        size: The image's height and width.
    """
    height, width = size
    compressed = coco.frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width)
    return {"size": [height, width], "counts": compressed["counts"].decode("ascii")}


def complement(rle: Rle) -> Rle:
    """All pixels that are not in the mask."""
    counts = runs(rle["counts"])
    return from_counts(counts[1:] if counts[0] == 0 else np.concatenate([[0], counts]), rle["size"])


def intersection(first: Rle, second: Rle) -> Rle:
    """The pixels that are in both."""
    merged = coco.merge([first, second], intersect=True)
    return {"size": list(merged["size"]), "counts": merged["counts"].decode("ascii")}


def shared_areas(rles: Sequence[Rle], others: Sequence[Rle]) -> NDArray[np.int64]:
    """Pixels that each of N masks shares with each of M others, N x M, exactly.

    pycocotools compares boxes first, and runs only where these overlap.
    """
    if not rles or not others:
        return np.zeros((len(rles), len(others)), np.int64)
    # As crowds, what is divided by is the area of the first.
    shares_NM: NDArray[np.float64] = coco.iou(list(rles), list(others), [1] * len(others))
    shared_NM: NDArray[np.int64] = np.rint(shares_NM * areas(rles)[:, None]).astype(np.int64)
    return shared_NM


def box_of(rle: Rle) -> list[int]:
    """x, y, width, height as in the masks table: last column minus first; zeros of an empty mask."""
    left, top, width, height = (int(value) for value in coco.toBbox(rle))
    return [left, top, max(width - 1, 0), max(height - 1, 0)]


def in_box(rle: Rle, bbox: Sequence[int]) -> NDArray[np.bool_]:
    """A mask's pixels inside its box, rows x columns.

    Args:
        rle: The mask.
        bbox: As `box_of`.
    """
    height = rle["size"][0]
    left, top, width, rows = bbox
    ends = np.cumsum(runs(rle["counts"]))
    ends = np.clip(ends - left * height, 0, (width + 1) * height)
    lengths = np.diff(ends, prepend=0)
    columns_WH = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths).reshape(width + 1, height)
    return columns_WH.T[top : top + rows + 1]
