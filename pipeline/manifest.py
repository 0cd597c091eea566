"""The manifest: the immutable, numbered listing of a run's images, and its shards.

It is written once, from a listing in any order, and always comes out the same: sorted by where the bytes lie,
so that a shard's images are neighbours, without repeated URIs, numbered from 0. Sorting is done outside
memory: sorted runs of `ROWS_IN_MEMORY` rows on local disk, then one merge.

Shard k is row group k % SHARDS_PER_PART of `manifest/part-{k // SHARDS_PER_PART:05d}.parquet`.
"""

import bisect
import functools
import hashlib
import itertools
import json
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import SettingsError, StorageError
from pipeline.sources import ImageRef
from schemas.manifest import MANIFEST_SCHEMA

pc: Final[Any] = pyarrow.compute  # whose stubs know no chunked columns

SHARDS_PER_PART: Final = 256
"""Row groups of a part, whose footer is read once for each of its shards."""
ROWS_IN_MEMORY: Final = 500_000
"""Rows of one sorted run, each its strings and some 50 bytes, three times while they are sorted."""
RUNS_OPEN: Final = 256
"""Runs merged at once: each is an open file and `_RUN_BATCH` to twice as many rows in memory."""

_CONVERTED_ROWS: Final = 10_000
_RUN_BATCH: Final = 1024
_DIGESTED_ROWS: Final = 20_000
_PARTS_PUT_AT_ONCE: Final = 16
_PART_READERS: Final = 16
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
    numbered = _Numbered()
    with tempfile.TemporaryDirectory(prefix="everymask-manifest-") as folder:
        tables = numbered(_sorted(images, Path(folder), rows_in_memory))
        parts = _make_parts(tables, Path(folder), images_per_shard)
        info = ManifestInfo(
            images=numbered.images,
            shards=-(-numbered.images // images_per_shard),
            duplicates=numbered.duplicates,
            digest=numbered.digest.hexdigest(),
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


def largest_first(output_uri: str, shards: list[int]) -> list[int]:
    """The shards in an order in which none that takes very long comes last.

    Those whose files have more than twice the mean's bytes come first, the largest at the front; the others stay
    in order. Files of unknown size count as empty.

    Raises:
        StorageError: the manifest cannot be read.
    """
    parts: dict[int, list[int]] = {}
    for shard in shards:
        parts.setdefault(shard // SHARDS_PER_PART, []).append(shard)
    sizes: dict[int, int] = {}
    with ThreadPoolExecutor(_PART_READERS, "manifest") as pool:
        for some in pool.map(lambda part: _sizes(_part_uri(output_uri, part[0]), part[1]), parts.items()):
            sizes |= some
    limit = 2 * sum(sizes.values()) / max(1, len(sizes))
    large = sorted((shard for shard in shards if sizes[shard] > limit), key=lambda shard: (-sizes[shard], shard))
    return large + [shard for shard in shards if sizes[shard] <= limit]


def _sizes(uri: str, shards: list[int]) -> dict[int, int]:
    """Bytes of the images of some shards of a part."""
    with _part(uri) as parquet:
        columns = {shard: parquet.read_row_group(shard % SHARDS_PER_PART, ["size"])["size"] for shard in shards}
    return {shard: sum(size or 0 for size in column.to_pylist()) for shard, column in columns.items()}


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
                for rows in _digested(parquet.read_row_group(group)):
                    digest.update(rows)
    return digest.hexdigest()


def _digested(table: pa.Table) -> Iterator[bytes | pa.Buffer]:
    """What the digest is taken of: each row but its number, as a JSON array."""
    for start in range(0, table.num_rows, _DIGESTED_ROWS):
        yield _as_json(table.slice(start, _DIGESTED_ROWS))


def _as_json(table: pa.Table) -> bytes | pa.Buffer:
    texts = [table[name] for name in ("uri", "etag", "container")]
    if any(pc.any(pc.match_substring_regex(text, "[^ -~]")).as_py() for text in texts):  # escapes of their own
        columns = [table[name].to_pylist() for name in _RUN_SCHEMA.names]
        return "".join(map(json.dumps, zip(*columns, strict=True))).encode()
    uri, etag, container = map(_quoted, texts)
    size, position = (pc.fill_null(pc.cast(table[name], pa.string()), "null") for name in ("size", "position"))
    rows = pc.binary_join_element_wise("[", uri, ", ", size, ", ", etag, ", ", container, ", ", position, "]", "")
    whole = pc.binary_join(pa.ListArray.from_arrays([0, len(rows)], rows.combine_chunks()), "")
    data: pa.Buffer = whole[0].as_buffer()
    return data


def _quoted(text: "pa.ChunkedArray[Any]") -> Any:
    escaped = pc.replace_substring(pc.replace_substring(text, "\\", "\\\\"), '"', '\\"')
    return pc.fill_null(pc.binary_join_element_wise('"', escaped, '"', ""), "null")


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


def _make_parts(tables: Iterable[pa.Table], folder: Path, images_per_shard: int) -> list[Path]:
    shards = _cut(tables, images_per_shard)
    paths: list[Path] = []
    while (first := next(shards, None)) is not None or not paths:
        paths.append(folder / _part_name(len(paths)))
        rest = itertools.islice(shards, SHARDS_PER_PART - 1)
        _write_part(paths[-1], [] if first is None else itertools.chain([first], rest))
    return paths


def _cut(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of so many; the last one may have fewer."""
    rest = MANIFEST_SCHEMA.empty_table()
    for table in tables:
        rest = pa.concat_tables([rest, table])
        whole = len(rest) // rows * rows
        for start in range(0, whole, rows):
            yield rest.slice(start, rows)
        rest = rest.slice(whole)
    if len(rest):
        yield rest


def _write_part(path: Path, shards: Iterable[pa.Table]) -> None:
    """A Parquet file with one row group a shard."""
    # Statistics are half of the footer, which every read of a shard reads.
    with pq.ParquetWriter(
        path,
        MANIFEST_SCHEMA,
        compression="zstd",
        use_dictionary=False,
        write_statistics=["image_id"],
    ) as writer:
        for rows in shards:
            writer.write_table(rows, len(rows))


def _put_parts(paths: list[Path], output_uri: str) -> None:
    def put(path: Path) -> None:
        with path.open("rb") as file:
            storage.write_atomic(f"{folder}/{path.name}", file)

    folder = _part_uri(output_uri, 0).rpartition("/")[0]
    with ThreadPoolExecutor(_PARTS_PUT_AT_ONCE, "manifest") as pool:
        list(pool.map(put, paths))
    names = {path.name for path in paths}
    for name in storage.list_names(folder):
        if name.startswith("part-") and name not in names:  # of a longer manifest that was here
            storage.delete(f"{folder}/{name}")


def _table(schema: pa.Schema, rows: Iterable[tuple[object, ...]]) -> pa.Table:
    columns = zip(*rows, strict=True)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    return pa.Table.from_arrays(arrays, schema=schema)


class _Numbered:
    """Drops repeated URIs of sorted rows and numbers the others; and what there is to say of them afterwards."""

    def __init__(self) -> None:
        self.images = self.duplicates = 0
        self.digest = hashlib.sha256()
        self._before: pa.Array[Any] = pa.array([None], pa.string())

    def __call__(self, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        for table in tables:
            uris = table["uri"].combine_chunks()
            before = pa.concat_arrays([self._before, uris.slice(0, len(uris) - 1)])
            self._before = uris.slice(len(uris) - 1)
            rows = table.filter(pc.fill_null(pc.not_equal(uris, before), True))
            self.duplicates += len(table) - len(rows)
            for digested in _digested(rows):
                self.digest.update(digested)
            numbers = pa.array(np.arange(self.images, self.images + len(rows)))
            self.images += len(rows)
            yield rows.add_column(0, MANIFEST_SCHEMA.field("image_id"), numbers).cast(MANIFEST_SCHEMA)


# Sorting outside memory

_Key = tuple[str, int, str, int, str]


def _in_order(table: pa.Table) -> pa.Table:
    """By where the bytes lie; the rest decides between repeated URIs, so that the same one is always kept."""
    keys: dict[str, Any] = {
        "where": pc.coalesce(table["container"], table["uri"]),
        "position": pc.fill_null(table["position"], 0),
        "uri": table["uri"],
        "size": pc.fill_null(table["size"], -1),
        "etag": pc.fill_null(table["etag"], ""),
    }
    return table.take(pc.sort_indices(pa.table(keys), [(name, "ascending") for name in keys]))


def _key(table: pa.Table, row: int) -> _Key:
    """What `_in_order` sorts by, to compare single rows."""
    uri, size, etag, container, position = (column[row].as_py() for column in table.columns)
    return container or uri, position or 0, uri, -1 if size is None else size, etag or ""


def _sorted(images: Iterable[ImageRef], folder: Path, rows_in_memory: int) -> Iterator[pa.Table]:
    images = iter(images)
    runs: list[Path] = []
    while (rows := _read(images, rows_in_memory)) is not None:
        if not runs and len(rows) < rows_in_memory:
            return iter([_in_order(rows)])  # all of it
        runs.append(_write_run([_in_order(rows)], folder))
        if len(runs) == RUNS_OPEN:
            merged = _write_run(_merged(runs), folder)
            for run in runs:
                run.unlink()
            runs = [merged]
    return _merged(runs)


def _read(images: Iterator[ImageRef], rows: int) -> pa.Table | None:
    """So many rows of a listing, fewer at its end; None after it."""
    tables: list[pa.Table] = []
    while rows and (refs := list(itertools.islice(images, min(rows, _CONVERTED_ROWS)))):
        tables.append(_table(_RUN_SCHEMA, refs))
        rows -= len(refs)
    return pa.concat_tables(tables).combine_chunks() if tables else None


def _write_run(tables: Iterable[pa.Table], folder: Path) -> Path:
    path = folder / f"{uuid.uuid4().hex}.arrow"
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, _RUN_SCHEMA, options=options) as writer:
        for table in tables:
            writer.write_table(table, max_chunksize=_RUN_BATCH)
    return path


def _merged(paths: list[Path]) -> Iterator[pa.Table]:
    """The rows of sorted runs in order: again and again those that no row still on disk can come before."""
    with ExitStack() as files:
        runs = [_Run(files.enter_context(pa.OSFile(str(path), "rb"))) for path in paths]
        while runs := [run for run in runs if run.fill()]:
            bound = min((run.last for run in runs if not run.ended), default=None)
            yield _in_order(pa.concat_tables([run.take(bound) for run in runs]).combine_chunks())


class _Run:
    """A sorted run on disk, and its next rows, `_RUN_BATCH` to twice as many, in memory."""

    def __init__(self, file: pa.NativeFile) -> None:
        self._batches = iter(pa.ipc.open_stream(file))
        self._rows = _RUN_SCHEMA.empty_table()
        self.ended = False

    def fill(self) -> bool:
        """Read on where few rows are left. Whether there are any."""
        while len(self._rows) < _RUN_BATCH and not self.ended:
            batch = next(self._batches, None)
            self.ended = batch is None
            if batch is not None:
                self._rows = pa.concat_tables([self._rows, pa.Table.from_batches([batch])])
        return len(self._rows) > 0

    @property
    def last(self) -> _Key:
        return _key(self._rows, len(self._rows) - 1)

    def take(self, bound: _Key | None) -> pa.Table:
        """Remove the rows up to and with `bound`; all if there is none."""
        count = len(self._rows)
        if bound is not None:
            count = bisect.bisect_right(range(count), bound, key=functools.partial(_key, self._rows))
        taken, self._rows = self._rows.slice(0, count), self._rows.slice(count)
        return taken
