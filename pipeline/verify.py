"""Whether a finished shard is what it must be."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import manifest, storage
from pipeline.amg import rle
from pipeline.errors import StorageError
from pipeline.manifest import ManifestRow
from pipeline.shard import Row, read_footer, shard_uri
from schemas.masks import MASKS_SCHEMA, PROCESSED, Status


def faults_of_shard(output: str, fingerprint: str, shard: int) -> list[str]:
    """What is wrong with a shard, a line each; nothing where it is sound.

    Checked are: the file is there and readable, of this run and this schema; its images are the manifest's,
    each once and in order; status, error, size and masks go together; every RLE decodes to its size, area and
    box.
    """
    uri = shard_uri(output, shard)
    name = uri.removeprefix(f"{output}/")
    try:
        if not storage.exists(uri):
            return [f"{name}: missing"]
        footer, summary = read_footer(output, shard)
        with storage.open_input(uri) as file:
            table = pq.read_table(file)
    except (StorageError, pa.ArrowException, OSError, KeyError, ValueError) as error:
        return [f"{name}: damaged: {error}"]
    if footer["fingerprint"] != fingerprint:
        return [f"{name}: of another run, fingerprint {footer['fingerprint']}"]
    if not table.schema.equals(MASKS_SCHEMA):
        return [f"{name}: of another schema"]
    rows = table.to_pylist()
    faults = [*_listing_faults(rows, manifest.read_shard(output, shard)), *_row_faults(rows)]
    if (len(rows), sum(len(row["masks"]) for row in rows)) != (summary.images, summary.masks):
        faults.append("its footer counts other images or masks")
    return [f"{name}: {fault}" for fault in faults]


def _listing_faults(rows: list[Row], listed: list[ManifestRow]) -> Iterator[str]:
    if len(rows) != len(listed):
        yield f"{len(rows)} rows for {len(listed)} images"
    for row, image in zip(rows, listed, strict=False):
        if (row["image_id"], row["uri"]) != (image.image_id, image.ref.uri):
            yield f"row of image {row['image_id']} where image {image.image_id} {image.ref.uri} belongs"


def _row_faults(rows: list[Row]) -> Iterator[str]:
    for row in rows:
        name = f"image {row['image_id']}"
        if row["status"] not in set(Status):
            yield f"{name}: unknown status {row['status']}"
        if bool(row["masks"]) != (row["status"] == Status.OK):
            yield f"{name}: status {row['status']} with {len(row['masks'])} masks"
        if (row["error"] is None) != (row["status"] in PROCESSED):
            yield f"{name}: status {row['status']} with the error {row['error']!r}"
        for i, mask in enumerate(row["masks"]):
            if fault := _mask_fault(mask, [row["height"], row["width"]]):
                yield f"{name}, mask {i}: {fault}"


def _mask_fault(mask: dict[str, Any], size: list[int]) -> str | None:
    segmentation = mask["segmentation"]
    if segmentation["size"] != size:
        return f"RLE of size {segmentation['size']}, the image is {size}"
    try:
        pixels = rle.decode(segmentation)
    except (ValueError, TypeError) as error:
        return f"RLE does not decode: {error}"
    if pixels.sum() != mask["area"]:
        return f"RLE of {pixels.sum()} pixels, area says {mask['area']}"
    columns, rows = (np.flatnonzero(pixels.any(axis=axis)) for axis in (0, 1))
    left, top, right, bottom = (columns[0], rows[0], columns[-1], rows[-1]) if len(rows) else (0, 0, 0, 0)
    box = [int(left), int(top), int(right - left), int(bottom - top)]
    if len(rows) and mask["bbox"] != box:
        return f"RLE in the box {box}, bbox says {mask['bbox']}"
    return None
