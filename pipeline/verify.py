"""Whether a finished shard is what it must be."""

from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import manifest, rle, storage
from pipeline.config import Kind
from pipeline.contents import Row, rows_of, schema_of
from pipeline.errors import StorageError
from pipeline.images import input_size_of
from pipeline.manifest import ManifestRow
from pipeline.shard import ShardSummary, read_footer, shard_uri
from schemas.masks import PROCESSED, Status


def faults_of_shard(output: str, kind: Kind, fingerprint: str, shard: int) -> list[str]:
    """What is wrong with a shard, a line each; nothing where it is sound.

    Checked are: the file is there and readable, of this run and this schema; its images are the manifest's,
    each once and in order; status, error, size and contents go together. Of masks: every RLE decodes to its
    size, area and box. Of embeddings: checksums, finite numbers, and the size that the encoder was given.

    Raises:
        StorageError: the manifest cannot be read.
    """
    uri = shard_uri(output, kind, shard)
    name = uri.removeprefix(f"{output}/")
    listed = manifest.read_shard(output, shard)
    try:
        if not storage.exists(uri):
            return [f"{name}: missing"]
        footer, summary = read_footer(output, kind, shard)
        if footer["fingerprint"] != fingerprint:
            return [f"{name}: of another run, fingerprint {footer['fingerprint']}"]
        determinants = footer["determinants"]
        with storage.open_input(uri) as file, pq.ParquetFile(file, page_checksum_verification=True) as parquet:
            if not parquet.schema_arrow.equals(schema_of(kind, determinants)):
                return [f"{name}: of another schema"]
            faults = _faults_of_rows(_rows(parquet), listed, summary, determinants)
            return [f"{name}: {fault}" for fault in faults]
    except (StorageError, pa.ArrowException, OSError, KeyError, ValueError) as error:
        return [f"{name}: damaged: {error}"]


def fault_of_manifest(output: str, shards: int, digest: str) -> str | None:
    """What is wrong with the manifest as a whole; None where it is the one that the run was begun with.

    Raises:
        StorageError: it cannot be read.
    """
    found = manifest.digest_of(output, shards)
    return None if found == digest else f"manifest: its digest is {found}, run.json says {digest}"


def strays(output: str, kind: Kind, shards: int) -> list[str]:
    """Files beside the shards that readers of the folder would take for some, as `masks/part-00042.parquet`."""
    expected = {shard_uri(output, kind, shard).rpartition("/")[2] for shard in range(shards)}
    found = set(storage.list_names(f"{output}/{kind}")) - expected
    return sorted(f"{kind}/{name}" for name in found if name.startswith("part-"))


def _rows(parquet: pq.ParquetFile) -> Iterator[Row]:
    """A row group in memory at a time."""
    for group in range(parquet.num_row_groups):
        yield from rows_of(parquet.read_row_group(group))


def _faults_of_rows(
    rows: Iterator[Row], listed: list[ManifestRow], summary: ShardSummary, determinants: dict[str, Any]
) -> Iterator[str]:
    count = masks = 0
    for row, image in zip_longest(rows, listed):
        if row is None:
            break
        if image is not None and (row["image_id"], row["uri"]) != (image.image_id, image.ref.uri):
            yield f"row of image {row['image_id']} where image {image.image_id} {image.ref.uri} belongs"
        yield from (f"image {row['image_id']}{fault}" for fault in _faults_of_row(row, determinants))
        count, masks = count + 1, masks + len(row.get("masks", ()))
    if count != len(listed):
        yield f"{count} rows for {len(listed)} images"
    if (count, masks) != (summary.images, summary.masks):
        yield "its footer counts other images or masks"


def _faults_of_row(row: Row, determinants: dict[str, Any]) -> Iterator[str]:
    status = row["status"]
    if status not in set(Status):
        yield f": unknown status {status}"
    if (row["error"] is None) != (status in PROCESSED):
        yield f": status {status} with the error {row['error']!r}"
    if "masks" not in row:
        if fault := embedding_fault(row, determinants["image_size"]):
            yield f": {fault}"
        return
    if bool(row["masks"]) != (status == Status.OK):
        yield f": status {status} with {len(row['masks'])} masks"
    faults = [_mask_fault(mask, [row["height"], row["width"]]) for mask in row["masks"]]
    yield from (f", mask {i}: {fault}" for i, fault in enumerate(faults) if fault)
    if "coverage" in row and not any(faults):
        yield from _curation_faults(row, flat=determinants["curation"]["flatten"] is not None)


def _curation_faults(row: Row, *, flat: bool) -> Iterator[str]:
    """What is wrong with parents, depths and coverage; of a partition also that its masks overlap."""
    masks = row["masks"]
    for i, mask in enumerate(masks):
        parent, depth = mask["parent_id"], mask["depth"]
        if parent is not None and not (0 <= parent < len(masks) and parent != i):
            yield f", mask {i}: parent {parent} of {len(masks)} masks"
        elif parent is None and depth not in {None, 0}:
            yield f", mask {i}: depth {depth} without a parent"
        elif parent is not None and (depth or 0) - 1 != masks[parent]["depth"]:
            yield f", mask {i}: depth {depth} under one of depth {masks[parent]['depth']}"
    found: tuple[float | None, int | None] = (None, None)
    if row["status"] in PROCESSED:
        pixels = row["height"] * row["width"]
        covered = rle.covered([mask["segmentation"] for mask in masks])
        found = (covered / pixels, pixels - covered)
        if flat and covered != sum(mask["area"] for mask in masks):
            yield ": masks of a partition overlap"
    if found != (row["coverage"], row["uncovered_area"]):
        yield f": coverage {row['coverage']}, uncovered area {row['uncovered_area']}, where its masks say {found}"


def embedding_fault(row: Row, image_size: int) -> str | None:
    """What is wrong with the embedding in a row of `rows_of`, and with the sizes that go with it.

    Args:
        row: Of a shard of embeddings. Its schema has the embedding's shape, so that is not looked at.
        image_size: Side of the encoder's input in pixels.
    """
    status, embedding_CGG = row["status"], row["embedding"]
    if status == Status.EMPTY or (embedding_CGG is not None) != (status == Status.OK):
        return f"status {status} with {'no' if embedding_CGG is None else 'an'} embedding"
    if embedding_CGG is None:
        return None
    if not np.isfinite(embedding_CGG).all():
        return "its embedding is not finite"
    if None in (row["height"], row["width"]):
        return "its size is missing"
    size = input_size_of((row["height"], row["width"]), image_size)
    if (row["input_height"], row["input_width"]) != size:
        return f"input of {row['input_height']} x {row['input_width']}, the image's is {size[0]} x {size[1]}"
    return None


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
