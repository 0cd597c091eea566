"""The manifest: the immutable, numbered listing of a run's images, and its shards.

It is written once, from a listing in any order, and always comes out the same: sorted by where the bytes lie,
so that a shard's images are neighbours, without repeated URIs, numbered from 0. Sorting is done outside
memory: sorted runs of `ROWS_IN_MEMORY` rows on local disk, then one merge.

Shard k is row group k % SHARDS_PER_PART of `manifest/part-{k // SHARDS_PER_PART:05d}.parquet`.
"""

import hashlib
import heapq
import io
import itertools
import json
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import SettingsError, StorageError
from pipeline.sources import ImageRef
from schemas.manifest import MANIFEST_SCHEMA

SHARDS_PER_PART: Final = 256
"""Row groups of a part: a part is made in memory, and its footer is read once for each of its shards."""
ROWS_IN_MEMORY: Final = 200_000
"""Rows of one sorted run, about 500 bytes each."""
RUNS_OPEN: Final = 256
"""Runs merged at once: each is an open file and `_RUN_BATCH` rows in memory."""

_RUN_BATCH: Final = 1024
_RUN_SCHEMA: Final = pa.schema([field for field in MANIFEST_SCHEMA if field.name != "image_id"])


@dataclass(frozen=True, kw_only=True)
class ManifestInfo:
    """What was written. `digest`: SHA-256 over every row but its number, as 64 hexadecimal digits."""

    images: int
    shards: int
    duplicates: int
    digest: str


class ManifestRow(NamedTuple):
    """One numbered image."""

    image_id: int
    ref: ImageRef


def write_manifest(
    images: Iterable[ImageRef],
    output_uri: str,
    *,
    images_per_shard: int,
    rows_in_memory: int = ROWS_IN_MEMORY,
    before_write: Callable[[ManifestInfo], None] = lambda _: None,
) -> ManifestInfo:
    """Sort, number and write the listing to `output_uri`/manifest/, in place of a manifest that is there.

    It is made whole on local disk first. Each part appears whole or not at all, but not all parts at once: what
    says that the manifest is complete has to be written after it. A listing without images gives one part
    without rows.

    Args:
        images: The listing, in any order.
        output_uri: The run's output.
        images_per_shard: Images a row group.
        rows_in_memory: Rows of one sorted run.
        before_write: Called with what will be written, before anything is; what it raises prevents that.

    Raises:
        SettingsError: `images_per_shard` is below 1.
        StorageError: it cannot be written, or the images not be listed.
    """
    if images_per_shard < 1:
        raise SettingsError(f"images_per_shard is {images_per_shard}; it must be 1 or more")
    digest = hashlib.sha256()
    count = duplicates = 0

    def numbered(refs: Iterator[ImageRef]) -> Iterator[ManifestRow]:
        nonlocal count, duplicates
        before = None
        for ref in refs:
            if ref.uri == before:
                duplicates += 1
            else:
                digest.update(_digested(ref))
                yield ManifestRow(count, ref)
                count += 1
                before = ref.uri

    with tempfile.TemporaryDirectory(prefix="everymask-manifest-") as folder:
        refs = _sorted(images, Path(folder), rows_in_memory)
        parts = _make_parts(numbered(refs), Path(folder), images_per_shard)
        info = ManifestInfo(
            images=count, shards=-(-count // images_per_shard), duplicates=duplicates, digest=digest.hexdigest()
        )
        before_write(info)
        _put_parts(parts, output_uri)
    return info


def read_shard(output_uri: str, shard: int) -> list[ManifestRow]:
    """The images of one shard, in order: one footer and one row group, by range reads.

    Raises:
        StorageError: the manifest is not there, has no such shard, or cannot be read.
    """
    uri = _part_uri(output_uri, shard // SHARDS_PER_PART)
    with _part(uri) as parquet:
        if shard < 0 or shard % SHARDS_PER_PART >= parquet.num_row_groups:
            raise StorageError(f"the manifest {storage.redact(uri)} has no shard {shard}")
        return _rows(parquet, shard % SHARDS_PER_PART)


def copy_manifest(source_uri: str, output_uri: str, shards: int) -> None:
    """Copy another run's manifest of so many shards, in place of one that is there.

    Raises:
        StorageError: it cannot be read or written.
    """
    with tempfile.TemporaryDirectory(prefix="everymask-manifest-") as folder:
        paths = [Path(folder, _part_name(part)) for part in range(max(1, -(-shards // SHARDS_PER_PART)))]
        for part, path in enumerate(paths):
            path.write_bytes(storage.read_bytes(_part_uri(source_uri, part)))
        _put_parts(paths, output_uri)


def digest_of(output_uri: str, shards: int) -> str:
    """The digest of the manifest that is there, which `ManifestInfo.digest` was when it was written.

    Raises:
        StorageError: a part of it is not there, or cannot be read.
    """
    digest = hashlib.sha256()
    for part in range(-(-shards // SHARDS_PER_PART)):
        with _part(_part_uri(output_uri, part)) as parquet:
            for group in range(parquet.num_row_groups):
                for row in _rows(parquet, group):
                    digest.update(_digested(row.ref))
    return digest.hexdigest()


def _digested(ref: ImageRef) -> bytes:
    return json.dumps(ref).encode()


@contextmanager
def _part(uri: str) -> Iterator[pq.ParquetFile]:
    try:
        with storage.open_input(uri) as file:
            yield pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise StorageError(f"the manifest {storage.redact(uri)} is damaged: {error}") from error


def _rows(parquet: pq.ParquetFile, group: int) -> list[ManifestRow]:
    table = parquet.read_row_group(group)
    columns = [table.column(name).to_pylist() for name in MANIFEST_SCHEMA.names]
    return [ManifestRow(image_id, ImageRef(*ref)) for image_id, *ref in zip(*columns, strict=True)]


def _part_name(part: int) -> str:
    return f"part-{part:05d}.parquet"


def _part_uri(output_uri: str, part: int) -> str:
    return f"{storage.canonical_uri(output_uri)}/manifest/{_part_name(part)}"


def _make_parts(rows: Iterator[ManifestRow], folder: Path, images_per_shard: int) -> list[Path]:
    shards = iter(lambda: list(itertools.islice(rows, images_per_shard)), [])
    paths: list[Path] = []
    while (first := next(shards, [])) or not paths:
        paths.append(folder / _part_name(len(paths)))
        paths[-1].write_bytes(_part_bytes(itertools.chain([first], itertools.islice(shards, SHARDS_PER_PART - 1))))
    return paths


def _put_parts(paths: list[Path], output_uri: str) -> None:
    for part, path in enumerate(paths):
        with path.open("rb") as file:
            storage.write_atomic(_part_uri(output_uri, part), file)
    names = {path.name for path in paths}
    folder = _part_uri(output_uri, 0).rpartition("/")[0]
    for name in storage.list_names(folder):
        if name.startswith("part-") and name not in names:  # of a longer manifest that was here
            storage.delete(f"{folder}/{name}")


def _part_bytes(shards: Iterable[list[ManifestRow]]) -> bytes:
    """A Parquet file with one row group a shard."""
    buffer = io.BytesIO()
    # Statistics are half of the footer, which every read of a shard reads.
    with pq.ParquetWriter(
        buffer,
        MANIFEST_SCHEMA,
        compression="zstd",
        use_dictionary=False,
        write_statistics=["image_id"],
    ) as writer:
        for rows in shards:
            if rows:
                writer.write_table(_table(MANIFEST_SCHEMA, ((row.image_id, *row.ref) for row in rows)), len(rows))
    return buffer.getvalue()


def _table(schema: pa.Schema, rows: Iterable[tuple[object, ...]]) -> pa.Table:
    columns = zip(*rows, strict=True)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    return pa.Table.from_arrays(arrays, schema=schema)


# Sorting outside memory


def _order(ref: ImageRef) -> tuple[str, int, str, int, str]:
    """By where the bytes lie; the rest decides between repeated URIs, so that the same one is always kept."""
    size = -1 if ref.size is None else ref.size
    return ref.container or ref.uri, ref.position or 0, ref.uri, size, ref.etag or ""


def _sorted(images: Iterable[ImageRef], folder: Path, rows_in_memory: int) -> Iterator[ImageRef]:
    images = iter(images)
    runs: list[Path] = []
    while rows := sorted(itertools.islice(images, rows_in_memory), key=_order):
        if not runs and len(rows) < rows_in_memory:
            return iter(rows)  # all of it
        runs.append(_write_run(rows, folder))
        if len(runs) == RUNS_OPEN:
            merged = _write_run(_merged(runs), folder)
            for run in runs:
                run.unlink()
            runs = [merged]
    return _merged(runs)


def _merged(runs: list[Path]) -> Iterator[ImageRef]:
    return heapq.merge(*map(_read_run, runs), key=_order)


def _write_run(rows: Iterable[ImageRef], folder: Path) -> Path:
    path = folder / f"{uuid.uuid4().hex}.arrow"
    rows = iter(rows)
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, _RUN_SCHEMA, options=options) as writer:
        while batch := list(itertools.islice(rows, _RUN_BATCH)):
            writer.write_table(_table(_RUN_SCHEMA, batch))
    return path


def _read_run(path: Path) -> Iterator[ImageRef]:
    with pa.OSFile(str(path), "rb") as file, pa.ipc.open_stream(file) as reader:
        for batch in reader:
            yield from map(ImageRef, *(column.to_pylist() for column in batch.columns))
