"""Tars and Parquet files: which images are in them, and what is wrong with a damaged one."""

import itertools
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Final, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import ImageError, StorageError
from pipeline.images import IMAGE_SUFFIXES
from pipeline.sources.refs import NOT_UTF8, ImageRef, is_storable, label_of, suffix_of
from pipeline.storage import FileInfo
from schemas.masks import Status

# What tarfile and pyarrow raise for bytes that are none of theirs; pyarrow also OSError.
DAMAGE: Final = (tarfile.TarError, pa.ArrowException, OSError, ValueError, EOFError, OverflowError)

_BYTES_COLUMNS: Final = ("image", "bytes", "image_bytes", "jpg")

Opened = tuple[Iterable[ImageRef], Counter[str]]
"""The images in a container, and what else is in it, counted by the names of `skipped`."""


@contextmanager
def _damage_marked(kind: str, file: FileInfo) -> Iterator[list[ImageRef]]:
    """A list of refs; where the container cannot be read on, one joins it that becomes a failed row."""
    refs: list[ImageRef] = []
    mark = ImageRef(f"{kind}://::{file.uri}", None, file.etag, file.uri, None)
    try:
        yield refs
    except StorageError as error:
        gone = isinstance(error.__cause__, FileNotFoundError | PermissionError)
        if not gone and not isinstance(error, storage.ChangedError):
            raise
        refs.append(mark)
    except DAMAGE:
        refs.append(mark)


def damage(ref: ImageRef, container: str) -> ImageError:
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


def _known(file: FileInfo) -> FileInfo:
    """With its size and version, which a list does not say."""
    return file if file.size is not None else storage.stat(file.uri) or file


# Tars


def _open_tar(file: FileInfo) -> Opened:
    skipped: Counter[str] = Counter()
    with _damage_marked("tar", file) as refs:
        file = _known(file)
        for member in tar_members(file):
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
    if not is_storable(member.name):
        return NOT_UTF8
    return None if suffix_of(member.name) in IMAGE_SUFFIXES else label_of(member.name)


def tar_members(file: FileInfo) -> Iterator[tarfile.TarInfo]:
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


# Parquet files


def _open_parquet(file: FileInfo) -> Opened:
    with _damage_marked("parquet", file) as refs:
        file = _known(file)
        layout = parquet_layout(file.uri, file.etag)
        if layout.column is None:
            return (), Counter({".parquet": 1})
        rows = (
            ImageRef(f"parquet://{row}::{file.uri}", None, file.etag, file.uri, row)
            for row in range(layout.first_rows[-1])
        )
        return rows, Counter()
    return refs, Counter()


class ParquetLayout(NamedTuple):
    """`first_rows`: of each row group, then the number of rows. `column`: the path of the images' bytes."""

    first_rows: list[int]
    column: str | None
    metadata: pq.FileMetaData


def parquet_layout(uri: str, etag: str | None) -> ParquetLayout:
    """What the file's footer says.

    Raises:
        StorageError: it cannot be read.
        DAMAGE: it is not a whole Parquet file.
    """
    with storage.open_input(uri, etag=etag) as stream:
        parquet = pq.ParquetFile(stream)
        metadata = parquet.metadata
        groups = (metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
        first_rows = list(itertools.accumulate(groups, initial=0))
        return ParquetLayout(first_rows, _bytes_column(parquet.schema_arrow), metadata)


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


OPENERS: Final = {".tar": _open_tar, ".parquet": _open_parquet}
"""By suffix: what lists the images in a container of that kind."""
