"""Sources: where images come from, and how one image's bytes are fetched.

`find_images` lists, `fetch` reads. In between lies an `ImageRef`, which says where the bytes are:

    an object of its own    uri, size, etag
    a tar's member          tar://MEMBER::URI of the tar, position = byte offset of the data, the tar's etag
    a Parquet file's row    parquet://ROW::URI of the file, position = row number, the file's etag
    a damaged container     tar://::URI or parquet://::URI without position: `fetch` says what is wrong

Tars and Parquet files are never downloaded to be listed, and nothing is ever unpacked.
"""

import bisect
import csv
import functools
import io
import itertools
import tarfile
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import PurePosixPath
from typing import Any, Final, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import ImageError, SettingsError, StorageError
from pipeline.images import IMAGE_SUFFIXES
from pipeline.storage import FileInfo
from schemas.masks import Status

LISTERS: Final = 16
"""Tars and Parquet files listed at the same time: a tar costs one small read a member."""

_COMPRESSED_TARS: Final = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
_URI_COLUMNS: Final = ("uri", "url", "image")
_BYTES_COLUMNS: Final = ("image", "bytes", "image_bytes", "jpg")
_BATCH_ROWS: Final = 64  # a batch of images must stay below Arrow's 2 GiB an array
_SKIPPED_NAMES: Final = 1000
_NOT_UTF8: Final = "(name that is not UTF-8)"
# What tarfile and pyarrow raise for bytes that are none of theirs; pyarrow also OSError.
_DAMAGE: Final = (tarfile.TarError, pa.ArrowException, OSError, ValueError, EOFError, OverflowError)


class ImageRef(NamedTuple):
    """Where one image is: the columns of `schemas.manifest.MANIFEST_SCHEMA` but `image_id`."""

    uri: str
    size: int | None
    etag: str | None
    container: str | None
    position: int | None


_Opened = tuple[Iterable[ImageRef], Counter[str]]


class _Named(NamedTuple):
    """A file to look at. `explicit`: the user named it, so it is an image whatever its suffix."""

    file: FileInfo
    explicit: bool


def find_images(address: str, skipped: Counter[str]) -> Iterator[ImageRef]:
    """Every image under an address, in no particular order.

    The address is a folder or prefix, a glob, a tar, a Parquet file with images in it, one image, or a
    list of URIs: a `.txt` (one a line), a `.csv` with a header or a `.parquet` (the column `uri`, `url` or
    `image`, or the only one). Entries of a list are addresses as in `storage`, or relative to the list's
    folder. A glob or a list takes what it names; a folder gives what has an image's suffix. Tars, and Parquet
    files with a column of images, are opened in each of them. `skipped` counts the rest: by suffix, dot-files
    by name.

    Raises:
        StorageError: the address cannot be listed, or a file in it not read after several attempts.
        SettingsError: a list has no column of URIs, or the address is a compressed tar.
    """
    pending: deque[Future[_Opened]] = deque()
    with ThreadPoolExecutor(LISTERS, thread_name_prefix="list") as pool:

        def finished(at_most: int) -> Iterator[ImageRef]:
            while len(pending) > at_most:
                refs, left_out = pending.popleft().result()
                for name, count in left_out.items():
                    _skip(skipped, name, count)
                yield from refs

        for file, explicit in _named_files(storage.canonical_uri(address), skipped):
            suffix = _suffix(file.uri)
            if not _storable(file.uri):
                _skip(skipped, _NOT_UTF8)
            elif suffix in {".tar", ".parquet"}:
                pending.append(pool.submit(_open_tar if suffix == ".tar" else _open_parquet, file))
                yield from finished(at_most=LISTERS)
            elif (explicit or suffix in IMAGE_SUFFIXES) and not file.uri.lower().endswith(_COMPRESSED_TARS):
                yield ImageRef(*file, None, None)
            else:
                _skip(skipped, _label(file.uri))
        yield from finished(at_most=0)


def fetch(ref: ImageRef, *, max_bytes: int) -> bytes:
    """The encoded bytes of one image, `max_bytes` at most. Safe from several threads.

    Raises:
        ImageError: `TOO_LARGE`, `FETCH_FAILED` (not there, not allowed, attempts exhausted), `CHANGED`
            (another size or version than listed), `EMPTY_FILE` (a Parquet row that is null), or for a damaged
            container `TRUNCATED` or `NOT_AN_IMAGE`.
    """
    if ref.size is not None and ref.size > max_bytes:
        raise _too_large(ref, ref.size, max_bytes)
    try:
        if ref.container is None:
            return _fetch_object(ref, max_bytes)
        if ref.position is None:
            raise _damage(ref, ref.container)
        if ref.size is None:
            return _fetch_row(ref, ref.container, ref.position, max_bytes)
        data = storage.read_bytes(ref.container, ref.position, ref.size, etag=ref.etag)
    except storage.ChangedError as error:
        raise ImageError(Status.CHANGED, str(error)) from error
    except StorageError as error:
        raise ImageError(Status.FETCH_FAILED, str(error)) from error
    if len(data) != ref.size:
        raise _changed(ref, f"{ref.size} bytes were listed and {len(data)} are there")
    return data


def _fetch_object(ref: ImageRef, max_bytes: int) -> bytes:
    # One byte more than expected shows that there is more, and bounds what is read if there is much more.
    expected = max_bytes if ref.size is None else ref.size
    data = storage.read_bytes(ref.uri, 0, expected + 1, etag=ref.etag)
    if ref.size is not None and len(data) != ref.size:
        found = "more" if len(data) > ref.size else str(len(data))
        raise _changed(ref, f"{ref.size} bytes were listed and {found} are there")
    if len(data) > max_bytes:
        raise _too_large(ref, None, max_bytes)
    return data


def _too_large(ref: ImageRef, size: int | None, max_bytes: int) -> ImageError:
    found = "more" if size is None else f"{size} bytes"
    return ImageError(Status.TOO_LARGE, f"{storage.redact(ref.uri)}: {found}, {max_bytes} bytes are allowed")


def _changed(ref: ImageRef, what: str) -> ImageError:
    return ImageError(Status.CHANGED, f"{storage.redact(ref.uri)} has changed since it was listed: {what}")


# Which files


def _named_files(uri: str, skipped: Counter[str]) -> Iterator[_Named]:
    for file in storage.list_files(uri):
        if file.uri != uri:  # below a folder, or a match of a glob
            yield _Named(file, explicit=not file.uri.startswith(f"{uri.rstrip('/')}/"))
        elif _is_list(file):
            for entry in _LISTS[_suffix(uri)](uri):
                if entry.strip():
                    yield _Named(FileInfo(_resolve(entry, uri), None, None), explicit=True)
                else:
                    _skip(skipped, "(empty entry)")
        elif uri.lower().endswith(_COMPRESSED_TARS):
            raise SettingsError(
                f"{storage.redact(uri)}: compressed tars cannot be read in parts; store it as .tar"
            )
        else:
            yield _Named(file, explicit=True)


def _is_list(file: FileInfo) -> bool:
    if _suffix(file.uri) != ".parquet":
        return _suffix(file.uri) in _LISTS
    try:
        return _parquet_layout(file.uri, file.etag).column is None
    except _DAMAGE:
        return False  # and so it is opened for its images, which makes the damage a row


def _resolve(entry: str, list_uri: str) -> str:
    """An entry of a list as a canonical URI; relative ones lie beside the list."""
    if "://" in entry or entry.startswith("/"):
        return storage.canonical_uri(entry)
    folder = list_uri.partition("?")[0] if list_uri.startswith("http") else list_uri
    folder = folder.rpartition("/")[0]
    while entry.startswith(("./", "../")):
        up, _, entry = entry.partition("/")
        folder = folder.rpartition("/")[0] if up == ".." else folder
    return storage.canonical_uri(f"{folder}/{entry}")


def _lines(uri: str) -> Iterator[str]:
    with _text(uri) as text:
        yield from (line for line in (line.rstrip("\n") for line in text) if line.strip())


def _csv_column(uri: str) -> Iterator[str]:
    with _text(uri) as text:
        rows = csv.reader(text)
        names = next(rows, [])
        column = _uri_column([name.strip().lower() for name in names], uri)
        for row in rows:
            if row:  # the csv module's blank line
                yield row[column] if column < len(row) else ""


def _parquet_column(uri: str) -> Iterator[str]:
    with storage.open_input(uri) as file:
        parquet = pq.ParquetFile(file)
        names = [field.name for field in parquet.schema_arrow if _is_text(field.type)]
        name = names[_uri_column([name.lower() for name in names], uri)]
        for batch in parquet.iter_batches(columns=[name]):
            for entry in batch.column(0).to_pylist():
                yield entry or ""


_LISTS: Final = {".txt": _lines, ".csv": _csv_column, ".parquet": _parquet_column}


@contextmanager
def _text(uri: str) -> Iterator[io.TextIOWrapper]:
    try:
        with io.TextIOWrapper(storage.open_input(uri), "utf-8-sig") as text:
            yield text
    except UnicodeDecodeError as error:
        raise SettingsError(f"the list {storage.redact(uri)} is not UTF-8: {error}") from error


def _uri_column(names: list[str], uri: str) -> int:
    for name in _URI_COLUMNS:
        if name in names:
            return names.index(name)
    if len(names) == 1:
        return 0
    raise SettingsError(
        f"{storage.redact(uri)} has neither images nor a column of URIs: name one of its columns"
        f" {' or '.join(_URI_COLUMNS)} (its columns of text: {', '.join(names) or 'none'})"
    )


def _suffix(uri: str) -> str:
    return PurePosixPath(uri.rpartition("/")[2]).suffix.lower()


def _label(uri: str) -> str:
    """How `skipped` names a file: by its suffix, a dot-file by its name."""
    name = uri.rpartition("/")[2]
    compressed = next((end for end in _COMPRESSED_TARS if name.lower().endswith(end)), "")
    return compressed or _suffix(uri) or (name if name.startswith(".") else "(no suffix)")


def _skip(skipped: Counter[str], name: str, count: int = 1) -> None:
    # Numbered suffixes could be millions.
    skipped[name if name in skipped or len(skipped) < _SKIPPED_NAMES else "(other)"] += count


def _storable(uri: str) -> bool:
    """Local names and tar members need not be UTF-8; the manifest is."""
    try:
        uri.encode()
    except UnicodeEncodeError:
        return False
    return True


# Tars and Parquet files


@contextmanager
def _damage_marked(mark: ImageRef, refs: list[ImageRef]) -> Iterator[None]:
    """Where the container cannot be read on, `mark` joins `refs`, so that it becomes a failed row."""
    try:
        yield
    except StorageError as error:
        gone = isinstance(error.__cause__, FileNotFoundError | PermissionError)
        if not gone and not isinstance(error, storage.ChangedError):
            raise
        refs.append(mark)
    except _DAMAGE:
        refs.append(mark)


def _open_tar(file: FileInfo) -> _Opened:
    skipped: Counter[str] = Counter()
    refs: list[ImageRef] = []
    with _damage_marked(ImageRef(f"tar://::{file.uri}", None, file.etag, file.uri, None), refs):
        file = _known(file)
        for member in _tar_members(file):
            if (refusal := _refusal(member)) is not None:
                skipped[refusal] += 1
            elif member.isfile():
                uri = f"tar://{member.name}::{file.uri}"
                refs.append(ImageRef(uri, member.size, file.etag, file.uri, member.offset_data))
    by_uri = {ref.uri: ref for ref in refs}  # as in unpacking, the last member of a name counts
    if len(by_uri) < len(refs):
        skipped["(tar member replaced by a later one)"] = len(refs) - len(by_uri)
    return by_uri.values(), skipped


def _refusal(member: tarfile.TarInfo) -> str | None:
    """Why a member is no image, as `skipped` names it; None for an image and for a folder."""
    if member.isdir():
        return None
    if not member.isfile() or member.issparse():
        return "(tar member that is no regular file)"
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "(tar member with a path out of the tar)"
    if not _storable(member.name):
        return _NOT_UTF8
    return None if _suffix(member.name) in IMAGE_SUFFIXES else _label(member.name)


def _tar_members(file: FileInfo) -> Iterator[tarfile.TarInfo]:
    """Every member whose header and data are there.

    Raises:
        tarfile.TarError: there is no end mark; `tarfile` itself takes much damage for the end, in silence.
    """
    with (
        storage.open_input(file.uri, etag=file.etag) as stream,
        tarfile.open(fileobj=stream, mode="r:") as tar,
    ):
        before = -1
        while (member := tar.next()) is not None:
            cut = file.size is not None and member.offset_data + member.size > file.size
            if cut or member.offset <= before:
                raise tarfile.ReadError("a member does not fit into the tar")
            before = member.offset
            tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
            yield member
        stream.seek(tar.offset)
        if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("no end mark")


def _open_parquet(file: FileInfo) -> _Opened:
    refs: list[ImageRef] = []
    with _damage_marked(ImageRef(f"parquet://::{file.uri}", None, file.etag, file.uri, None), refs):
        file = _known(file)
        layout = _parquet_layout(file.uri, file.etag)
        if layout.column is None:
            return (), Counter({".parquet": 1})
        rows = (
            ImageRef(f"parquet://{row}::{file.uri}", None, file.etag, file.uri, row)
            for row in range(layout.first_rows[-1])
        )
        return rows, Counter()
    return refs, Counter()


def _known(file: FileInfo) -> FileInfo:
    """With its size and version, which a list does not say."""
    return file if file.size is not None else storage.stat(file.uri) or file


class _Layout(NamedTuple):
    """`first_rows`: of each row group, then the number of rows. `column`: the path of the images' bytes."""

    first_rows: list[int]
    column: str | None
    metadata: pq.FileMetaData


def _parquet_layout(uri: str, etag: str | None) -> _Layout:
    with storage.open_input(uri, etag=etag) as stream:
        parquet = pq.ParquetFile(stream)
        metadata = parquet.metadata
        groups = (metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
        first_rows = list(itertools.accumulate(groups, initial=0))
        return _Layout(first_rows, _bytes_column(parquet.schema_arrow), metadata)


def _bytes_column(schema: pa.Schema) -> str | None:
    for name in _BYTES_COLUMNS:
        if name in schema.names and _is_binary(schema.field(name).type):
            return name
    for field in sorted(schema, key=lambda field: field.name != "image"):
        if isinstance(field.type, pa.StructType):
            index = field.type.get_field_index("bytes")
            if index >= 0 and _is_binary(field.type.field(index).type):
                return f"{field.name}.bytes"
    return None


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


# Consecutive rows share a row group, so the last ones stay; the lock keeps threads from reading one twice.
_ROW_GROUPS_KEPT: Final = 2
_rows_lock: Final = threading.Lock()
_kept_layout: Final = functools.lru_cache(_ROW_GROUPS_KEPT)(_parquet_layout)


@functools.lru_cache(_ROW_GROUPS_KEPT)
def _row_group(uri: str, etag: str | None, group: int) -> "pa.ChunkedArray[Any]":
    layout = _kept_layout(uri, etag)
    with storage.open_input(uri, etag=etag) as stream:
        parquet = pq.ParquetFile(stream, metadata=layout.metadata)
        batches = parquet.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[layout.column])
        columns = [batch.column(0) for batch in batches]
    if "." in str(layout.column):
        columns = [pc.struct_field(column, "bytes") for column in columns]
    return pa.chunked_array(columns)


def _fetch_row(ref: ImageRef, container: str, row: int, max_bytes: int) -> bytes:
    try:
        with _rows_lock:
            first_rows = _kept_layout(container, ref.etag).first_rows
            if row >= first_rows[-1]:
                raise _changed(ref, f"it has {first_rows[-1]} rows")
            group = bisect.bisect_right(first_rows, row) - 1
            value = _row_group(container, ref.etag, group)[row - first_rows[group]]
    except _DAMAGE as error:
        message = f"{storage.redact(ref.uri)}: the file is damaged: {error}"
        raise ImageError(Status.TRUNCATED, message) from error
    if not value.is_valid:
        raise ImageError(Status.EMPTY_FILE, f"{storage.redact(ref.uri)}: the row holds no bytes (null)")
    data = value.as_buffer()
    if data.size > max_bytes:
        raise _too_large(ref, data.size, max_bytes)
    return bytes(data)


def _damage(ref: ImageRef, container: str) -> ImageError:
    """What is wrong with a container that could not be listed to its end."""
    head = storage.read_bytes(container, 0, tarfile.BLOCKSIZE)
    begins_well = head[:4] == b"PAR1"
    if ref.uri.startswith("tar://"):
        with suppress(tarfile.HeaderError):
            begins_well = bool(tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape"))
    where = storage.redact(container)
    if begins_well:
        return ImageError(Status.TRUNCATED, f"{where} is cut or damaged: images from there on are missing")
    kind = "tar" if ref.uri.startswith("tar://") else "Parquet file"
    return ImageError(Status.NOT_AN_IMAGE, f"{where} is no {kind} and no image")
