"""The manifest: the immutable, numbered listing of a run's images, and its shards.

It is written once, from a listing in any order, and always comes out the same: sorted by where the bytes lie,
so that a shard's images are neighbours, without repeated URIs, numbered from 0. Of a listing that is in order its
first parts are final, and can be put, long before its end.

Shard k is row group k % SHARDS_PER_PART of `manifest/part-{k // SHARDS_PER_PART:05d}.parquet`.
"""

import hashlib
import itertools
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import SettingsError, StorageError
from pipeline.sorting import LISTED, in_order, in_order_as_far_as, tables_of
from pipeline.sources import ImageRef
from schemas.manifest import MANIFEST_SCHEMA

pc: Final[Any] = pyarrow.compute  # whose stubs know no chunked columns

SHARDS_PER_PART: Final = 256
"""Row groups of a part, whose footer is read once for each of its shards."""
ROWS_IN_MEMORY: Final = 500_000
"""Rows sorted at once, each its strings and some 50 bytes, three times while they are sorted."""
_DIGESTED_ROWS: Final = 20_000
_PARTS_PUT_AT_ONCE: Final = 16
_PART_READERS: Final = 16


@dataclass(frozen=True, kw_only=True)
class ManifestInfo:
    """What was written. `digest`: SHA-256 over every row but its number, as 64 hexadecimal digits."""

    images: int
    shards: int
    duplicates: int
    digest: str


@dataclass(frozen=True)
class EarlyParts:
    """Parts of a manifest that are put while its images are still listed."""

    put: Callable[[int], None]
    """Called with the number of parts that are final, each time there is one more."""
    there: int = 0
    """Parts that a listing that was cut short has put. Their images keep their numbers, and those that the listing
    has beside them come after."""


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
    early: EarlyParts | None = None,
) -> ManifestInfo:
    """Sort, number and write the listing to `output_uri`/manifest/, in place of a manifest that is there.

    Each part appears whole or not at all, but not all parts at once: what says that the manifest is complete has
    to be written after it. A listing without images gives one part without rows.

    Args:
        images: The listing, in any order.
        output_uri: The run's output.
        images_per_shard: Images a row group.
        rows_in_memory: Rows sorted at once.
        before_write: Called with what will be written, before anything is, or, with `early`, before the last part
            is; what it raises prevents that.
        early: For a listing in order: each part is put as soon as it is full. Where the listing turns out not to
            be in order, the rest of it is sorted, and its parts are put after its end.

    Raises:
        SettingsError: `images_per_shard` is below 1.
        StorageError: it cannot be written, or the images not be listed.
    """
    if images_per_shard < 1:
        raise SettingsError(f"images_per_shard is {images_per_shard}; it must be 1 or more")
    there = 0 if early is None else early.there
    part_images = SHARDS_PER_PART * images_per_shard
    numbered = _Numbered(there * part_images, _digest_of(output_uri, there * SHARDS_PER_PART))
    with tempfile.TemporaryDirectory(prefix="everymask-manifest-") as name:
        folder = Path(name)
        if early is not None and not there:
            tables = in_order_as_far_as(tables_of(images, part_images), folder)
        else:
            rows_there = itertools.chain.from_iterable(_rows_there(output_uri, part) for part in range(there))
            tables = in_order(itertools.chain(rows_there, tables_of(images, rows_in_memory)), folder)
        left: list[Path] = []
        for part, path in enumerate(_make_parts(numbered(tables), folder, images_per_shard, there), there + 1):
            left.append(path)
            if early is not None and numbered.images >= part * part_images:  # it is full
                _put_parts(left, output_uri)
                path.unlink()
                left.clear()
                early.put(part)
        info = ManifestInfo(
            images=numbered.images,
            shards=-(-numbered.images // images_per_shard),
            duplicates=numbered.duplicates,
            digest=numbered.digest.hexdigest(),
        )
        if not info.shards:
            left.append(folder / _part_name(0))
            _write_part(left[0], [])
        before_write(info)
        _put_parts(left, output_uri)
        _delete_other_parts(output_uri, info.shards)
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
    _delete_other_parts(output_uri, shards)


def digest_of(output_uri: str, shards: int) -> str:
    """The digest of the manifest that is there, which `ManifestInfo.digest` was when it was written.

    Raises:
        StorageError: a part of it is not there, or cannot be read.
    """
    return _digest_of(output_uri, shards).hexdigest()


def _digest_of(output_uri: str, shards: int) -> "hashlib._Hash":
    digest = hashlib.sha256()
    for part in range(-(-shards // SHARDS_PER_PART)):
        with _part(_part_uri(output_uri, part)) as parquet:
            for group in range(parquet.num_row_groups):
                for rows in _digested(parquet.read_row_group(group)):
                    digest.update(rows)
    return digest


def _rows_there(output_uri: str, part: int) -> Iterator[pa.Table]:
    """A part's rows, as `pipeline.sorting` has them."""
    with _part(_part_uri(output_uri, part)) as parquet:
        rows = parquet.read(list(LISTED))
    yield rows.append_column("new", pa.array(np.zeros(len(rows), bool)))


def _digested(table: pa.Table) -> Iterator[bytes | pa.Buffer]:
    """What the digest is taken of: each row but its number, as a JSON array."""
    for start in range(0, table.num_rows, _DIGESTED_ROWS):
        yield _as_json(table.slice(start, _DIGESTED_ROWS))


def _as_json(table: pa.Table) -> bytes | pa.Buffer:
    texts = [table[name] for name in ("uri", "etag", "container")]
    if any(pc.any(pc.match_substring_regex(text, "[^ -~]")).as_py() for text in texts):  # escapes of their own
        columns = [table[name].to_pylist() for name in LISTED]
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


def _make_parts(tables: Iterable[pa.Table], folder: Path, images_per_shard: int, first: int) -> Iterator[Path]:
    """The parts of a manifest from a number on, each when it is whole."""
    shards = _cut(tables, images_per_shard)
    for part in itertools.count(first):
        if (shard := next(shards, None)) is None:
            return
        path = folder / _part_name(part)
        _write_part(path, itertools.chain([shard], itertools.islice(shards, SHARDS_PER_PART - 1)))
        yield path


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


def _delete_other_parts(output_uri: str, shards: int) -> None:
    """Those of a longer manifest that was there."""
    folder = _part_uri(output_uri, 0).rpartition("/")[0]
    names = {_part_name(part) for part in range(max(1, -(-shards // SHARDS_PER_PART)))}
    for name in storage.list_names(folder):
        if name.startswith("part-") and name not in names:
            storage.delete(f"{folder}/{name}")


class _Numbered:
    """Drops repeated URIs of sorted rows and those that have a number, and numbers the others."""

    def __init__(self, images: int, digest: "hashlib._Hash") -> None:
        self.images, self.digest = images, digest
        self.duplicates = 0
        self._uri: pa.Array[Any] = pa.array([None], pa.string())
        self._new: pa.Array[Any] = pa.array([True])

    def __call__(self, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        for table in tables:
            uri, new = table["uri"].combine_chunks(), table["new"].combine_chunks()
            before = pa.concat_arrays([self._uri, uri.slice(0, len(uri) - 1)])
            new_before = pa.concat_arrays([self._new, new.slice(0, len(new) - 1)])
            self._uri, self._new = uri.slice(len(uri) - 1), new.slice(len(new) - 1)
            repeated = pc.fill_null(pc.equal(uri, before), False)
            self.duplicates += pc.sum(pc.and_(repeated, new_before)).as_py() or 0
            rows = table.filter(pc.and_not(new, repeated)).select(LISTED)
            for digested in _digested(rows):
                self.digest.update(digested)
            numbers = pa.array(np.arange(self.images, self.images + len(rows)))
            self.images += len(rows)
            yield rows.add_column(0, MANIFEST_SCHEMA.field("image_id"), numbers).cast(MANIFEST_SCHEMA)
