"""A masks dataset as readers find it: what its `run.json` says, its shards, and the images of its rows."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline import manifest, sources, storage
from pipeline.contents import schema_of
from pipeline.documents import read_masks, shards_done
from pipeline.errors import ImageError, TrainingDataError
from pipeline.images import decode_image
from pipeline.manifest import ManifestRow
from pipeline.shard import shard_uri
from schemas.masks import Status

_SHARDS_KEPT: Final = 256  # footers and listings
_ROW_GROUPS_KEPT: Final = 16


@dataclass(frozen=True)
class StoredMasks:
    """A masks dataset, as its `run.json` describes it. Small; can be sent to workers."""

    output: str
    fingerprint: str
    manifest_digest: str
    images: int
    """In the manifest, with those of shards that are missing."""
    images_per_shard: int
    missing: int
    """Shards without a file: the run was not finished."""
    shards: tuple[int, ...]
    """Numbers of those that have one, ascending."""
    max_bytes: int
    """Of an image's file, for `pipeline.sources.fetch`."""
    max_pixels: int
    """Of an image, for `pipeline.images.decode_image`."""
    images_uri: str
    """What the run was given as --images."""
    schema: pa.Schema
    """Of the shards: `schemas.masks.MASKS_SCHEMA`, or `schemas.curated.CURATED_SCHEMA`."""

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the rows and their order, as JSON."""
        return {
            "fingerprint": self.fingerprint,
            "manifest_digest": self.manifest_digest,
            "shards": len(self.shards),
        }

    def images_in(self, shard: int) -> int:
        """How many images a shard has; the last one may have fewer than the others."""
        return min(self.images_per_shard, self.images - shard * self.images_per_shard)


def stored_masks(uri: str) -> StoredMasks:
    """Look at a dataset before reading it; its shards may be some of the run's.

    Args:
        uri: What the command that made it was given as --output.

    Raises:
        OutputConflict: there is no run, or it is not of masks.
        SettingsError: it has a newer schema than this version reads.
        TrainingDataError: no shard is finished.
        StorageError: it cannot be read.
    """
    output = storage.canonical_uri(uri)
    name = storage.redact(output)
    document = read_masks(output)
    determinants, listing = document["determinants"], document["manifest"]
    shards = tuple(sorted(shards_done(output, "masks") & set(range(listing["shards"]))))
    if listing["shards"] and not shards:
        raise TrainingDataError(f"{name} holds no finished shard of masks.")
    return StoredMasks(
        output=output,
        fingerprint=document["fingerprint"],
        manifest_digest=listing["digest"],
        images=listing["images"],
        images_per_shard=determinants["images_per_shard"],
        missing=listing["shards"] - len(shards),
        shards=shards,
        max_bytes=determinants["reading"]["max_bytes"],
        max_pixels=determinants["reading"]["max_pixels"],
        images_uri=determinants["images"],
        schema=schema_of("masks", determinants),
    )


def open_masks(uri: str) -> ds.Dataset:
    """A masks dataset for `pyarrow.dataset`, on any address that the commands take; and so for DuckDB and Polars.

    Nothing but `run.json` and the names of the shards is read before it is scanned. Columns and filters are pushed
    down. Of local disk Arrow reads by itself; elsewhere what may pass by itself is tried again, as everywhere in
    `pipeline.storage`. A curated dataset has `schemas.curated.CURATED_SCHEMA`.

    Raises:
        OutputConflict, SettingsError, TrainingDataError, StorageError: as `stored_masks`.
    """
    stored = stored_masks(uri)
    filesystem, folder = storage.arrow_filesystem(stored.output)
    return ds.FileSystemDataset.from_paths(
        [shard_uri(folder, "masks", shard) for shard in stored.shards],
        schema=stored.schema,
        format=ds.ParquetFileFormat(),
        filesystem=filesystem,
    )


class Shard(NamedTuple):
    """What must be known of a shard to read some of it."""

    footer: pq.FileMetaData
    first_rows: list[int]
    """Of each row group, and the number of all."""
    listed: list[ManifestRow]


class ShardReader:
    """Reads parts of shards. Footers and listings of the last shards, and the last row groups, stay in memory.

    What its methods raise: `StorageError` for a storage that does not answer, `TrainingDataError` for a shard that
    is damaged.
    """

    def __init__(self, stored: StoredMasks) -> None:
        self._output = stored.output
        self.shard = lru_cache(_SHARDS_KEPT)(self._shard)
        """Footer and listing of a shard."""
        self.row_group = lru_cache(_ROW_GROUPS_KEPT)(self._row_group)
        """One row group of a shard, as a table."""

    def rows(self, number: int, rows: range) -> Iterator[tuple[ManifestRow, dict[str, Any]]]:
        """Some rows of a shard, one after another, and what the manifest says of each one's image."""
        shard = self.shard(number)
        for group, first in enumerate(shard.first_rows[:-1]):
            begin, end = max(rows.start, first), min(rows.stop, shard.first_rows[group + 1])
            if begin < end:
                table = self.row_group(number, group).slice(begin - first, end - begin)
                yield from zip(shard.listed[begin:end], table.to_pylist(), strict=True)

    def _shard(self, number: int) -> Shard:
        uri = shard_uri(self._output, "masks", number)
        try:
            with storage.open_input(uri) as file:
                footer = pq.read_metadata(file)
        except (pa.ArrowException, OSError) as error:
            raise _damaged(uri, error) from error
        rows = (footer.row_group(group).num_rows for group in range(footer.num_row_groups))
        listed = manifest.read_shard(self._output, number)
        if footer.num_rows != len(listed) or not listed:
            raise _damaged(uri, f"{footer.num_rows} rows for {len(listed)} images")
        return Shard(footer, list(accumulate(rows, initial=0)), listed)

    def _row_group(self, number: int, group: int) -> pa.Table:
        uri = shard_uri(self._output, "masks", number)
        try:
            with storage.open_input(uri) as file:
                return pq.ParquetFile(file, metadata=self.shard(number).footer).read_row_group(group)
        except (pa.ArrowException, OSError) as error:
            raise _damaged(uri, error) from error


def read_picture(stored: StoredMasks, row: dict[str, Any], listed: ManifestRow) -> NDArray[np.uint8]:
    """Read the image of a row again from where it lay: rgb_HW3.

    Raises:
        ImageError: it cannot be read, or is not the one that the masks are of.
    """
    data = sources.fetch(listed.ref, max_bytes=stored.max_bytes)
    rgb_HW3 = decode_image(data, max_pixels=stored.max_pixels)
    if rgb_HW3.shape[:2] != (row["height"], row["width"]):
        raise ImageError(
            Status.CHANGED,
            f"{storage.redact(row['uri'])}: {rgb_HW3.shape[:2]} pixels, its masks have "
            f"{(row['height'], row['width'])}",
        )
    return rgb_HW3


def _damaged(uri: str, what: object) -> TrainingDataError:
    return TrainingDataError(
        f"{storage.redact(uri)} is damaged: {what}. jobs.verify_masks --remove-damaged deletes it, and the "
        "command that made it makes it again."
    )
