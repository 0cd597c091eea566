"""The images that the report shows: a small picture each, and the outlines of its masks."""

import io
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from pipeline import manifest, sources, storage
from pipeline.errors import ImageError
from pipeline.images import decode_image
from pipeline.manifest import ManifestRow
from pipeline.overlay import outline_path
from pipeline.shard import shard_uri
from schemas.masks import Status

SIDE: Final = 640
"""Of a picture in the page at most, in pixels."""
MOST_OUTLINES: Final = 150
"""Of a picture; the largest masks are outlined."""
_MOST_POINTS: Final = 200  # of an outline
_JPEG_BYTES: Final = 100_000
_JPEG_QUALITIES: Final = (80, 60, 40, 20)


class Outline(NamedTuple):
    """A mask as the page draws it."""

    path: str
    """Of an SVG, in the pixels of the small picture."""
    area: int
    """Pixels of the image."""
    predicted_iou: float
    stability_score: float | None
    """None where it is no number."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One image as the page shows it."""

    image_id: int
    uri: str
    """Without credentials."""
    size: tuple[int, int]
    """Width and height of the image in pixels."""
    shown_size: tuple[int, int]
    """The same of the small picture."""
    jpeg: bytes
    """The small picture; empty where the image could not be read."""
    missing: str | None
    """Why it could not."""
    masks: int
    """All of the image's; at most `MOST_OUTLINES` are outlined."""
    outlines: tuple[Outline, ...]
    """The largest first, so that small ones lie on top."""


def shown_images(output: str, document: dict[str, Any], image_ids: Iterable[int]) -> Iterator[Shown]:
    """Read images and their rows again, one after another, in the order of their numbers.

    An image that is gone, or is no longer the one that was listed, is shown by its outlines alone.

    Args:
        output: Canonical address of the dataset.
        document: Its `run.json`.
        image_ids: Of images that were processed, in readable shards.

    Raises:
        StorageError: the manifest cannot be read.
    """
    reading, per_shard = (document["determinants"][name] for name in ("reading", "images_per_shard"))
    for shard, of_shard in itertools.groupby(sorted(image_ids), lambda image_id: image_id // per_shard):
        places = [image_id % per_shard for image_id in of_shard]
        listed = manifest.read_shard(output, shard)
        for place, row in zip(places, _rows_at(shard_uri(output, "masks", shard), places), strict=True):
            yield _shown(row, listed[place], reading)


def _rows_at(uri: str, places: list[int]) -> Iterator[dict[str, Any]]:
    """Rows of a shard by their ascending places; one row group in memory at a time."""
    with storage.open_input(uri) as file, pq.ParquetFile(file) as parquet:
        first = 0
        for group in range(parquet.num_row_groups):
            end = first + parquet.metadata.row_group(group).num_rows
            if within := [place - first for place in places if first <= place < end]:
                yield from parquet.read_row_group(group).take(within).to_pylist()
            first = end


def _shown(row: dict[str, Any], listed: ManifestRow, reading: dict[str, Any]) -> Shown:
    width, height = row["width"], row["height"]
    scale = min(1.0, SIDE / max(width, height))
    shown_size = max(1, round(width * scale)), max(1, round(height * scale))
    jpeg, missing = b"", None
    try:
        jpeg = _small_jpeg(_picture(listed, (width, height), reading), shown_size)
    except ImageError as error:
        missing = f"{error.status}: {storage.redact(str(error))}"
    largest = sorted(row["masks"], key=lambda mask: -mask["area"])[:MOST_OUTLINES]
    return Shown(
        image_id=row["image_id"],
        uri=storage.redact(row["uri"]),
        size=(width, height),
        shown_size=shown_size,
        jpeg=jpeg,
        missing=missing,
        masks=len(row["masks"]),
        outlines=tuple(_outline(mask, scale) for mask in largest),
    )


def _picture(listed: ManifestRow, size: tuple[int, int], reading: dict[str, Any]) -> NDArray[np.uint8]:
    """The image, if it is still there and of the size that its masks have; else `ImageError`."""
    data = sources.fetch(listed.ref, max_bytes=reading["max_bytes"])
    rgb_HW3 = decode_image(data, max_pixels=reading["max_pixels"])
    height, width = rgb_HW3.shape[:2]
    if (width, height) != size:
        raise ImageError(
            Status.CHANGED,
            f"{storage.redact(listed.ref.uri)}: {width} x {height} pixels, its masks are of {size[0]} x {size[1]}",
        )
    return rgb_HW3


def _outline(mask: dict[str, Any], scale: float) -> Outline:
    stability = mask["stability_score"]
    return Outline(
        outline_path(mask["segmentation"], scale, _MOST_POINTS),
        mask["area"],
        round(mask["predicted_iou"], 4),
        None if math.isnan(stability) else round(stability, 4),
    )


def _small_jpeg(rgb_HW3: NDArray[np.uint8], size: tuple[int, int]) -> bytes:
    """In the best quality that takes no more than `_JPEG_BYTES`, if one does."""
    small = Image.fromarray(rgb_HW3).resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    data = b""
    for quality in _JPEG_QUALITIES:
        file = io.BytesIO()
        small.save(file, "JPEG", quality=quality, optimize=True)
        data = file.getvalue()
        if len(data) <= _JPEG_BYTES:
            break
    return data
