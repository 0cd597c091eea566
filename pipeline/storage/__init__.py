"""Storage: list, read ranges, write whole files, on local disk and on everything that fsspec reaches.

An address is a local path or one fsspec URI (`s3://bucket/key`, `gs://...`, `https://...`). Nothing in it
is percent-decoded or encoded: after `s3://bucket/` stands the key, after `file://` the path. Slashes at the
end do not count, so a key that ends in `/` (a folder marker) cannot be named.

Local disk and S3 have code of their own, `local` and `s3`, because fsspec's general calls hold a whole
listing in memory, read `?versionId=` out of keys and ask twice before they read once. `other` does the rest
with fsspec's calls.

Every function raises `StorageError`, with the address and the cause, and without the credentials that
may be in either. What may pass by itself (time-outs, resets, throttling, 5xx) is tried again first.
"""

import io
import os
import re
from collections.abc import Iterator
from functools import cache
from typing import IO, BinaryIO, Final, Protocol

import pyarrow.fs
from fsspec.utils import glob_translate

from pipeline.errors import ChangedError, StorageError
from pipeline.storage import local, other, s3
from pipeline.storage.arrow import ReadOnlyHandler
from pipeline.storage.attempts import at_most, attempt, redact
from pipeline.storage.files import FileInfo, RangedFile

__all__ = [
    "ChangedError",
    "FileInfo",
    "arrow_filesystem",
    "at_most",
    "canonical_uri",
    "delete",
    "exists",
    "is_inside",
    "list_files",
    "list_names",
    "lists_in_order",
    "open_input",
    "read_bytes",
    "redact",
    "stat",
    "write_atomic",
]

_READ_AHEAD_BYTES: Final = 256 * 1024

_SCHEME: Final = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://")
_GLOB: Final = re.compile(r"[*?\[]")
_SAME_SCHEME: Final = {"s3a": "s3", "gcs": "gs"}


class _Store(Protocol):
    """What each of `local`, `s3` and `other` does with canonical URIs, as the public functions describe it.

    `walk` and `names` make their attempts themselves, a page or a folder at a time; the others make none.
    """

    def stat(self, uri: str, /) -> FileInfo | None: ...

    def read(self, uri: str, offset: int, size: int | None, etag: str | None, /) -> bytes: ...

    def write(self, uri: str, data: IO[bytes], /) -> None: ...

    def delete(self, uri: str, /) -> None: ...

    def names(self, uri: str, /) -> Iterator[str]: ...

    def walk(self, uri: str, stem: str, depth: int | None, /) -> Iterator[FileInfo]:
        """Every file below a folder, on S3 with the folder markers, whose URIs end in `/`.

        `stem` (names begin with it) and `depth` (folders below this one) may be used to list less. In the order
        of the URIs where `lists_in_order` says so.
        """

    def lists_in_order(self, uri: str, /) -> bool: ...

    def folder_exists(self, uri: str, /) -> bool:
        """Asked where a listing was empty: on S3 only a bucket itself can be an empty folder."""


def _store(uri: str) -> _Store:
    if uri.startswith("file://"):
        return local
    if uri.startswith(("s3://", "s3a://")):
        return s3
    return other


def canonical_uri(address: str) -> str:
    """The one spelling of an address: local paths become absolute `file:///...`, slashes at the end go."""
    scheme = _scheme(address)
    if scheme in {"file", "local"}:
        return "file://" + os.path.abspath(address.removeprefix(f"{scheme}://"))  # noqa: PTH100 (folds `..` too)
    if scheme in {"http", "https"}:
        return address
    head, _, path = address.partition("://")
    return f"{head}://{path.rstrip('/')}"


def is_inside(uri: str, listed: str) -> bool:
    """Whether a file of this name could be among what `list_files` finds under an address.

    Links on local disk are followed, other names of a scheme count as the same. Of a pattern, what stands before
    the first wildcard decides, so that some are taken for inside that the pattern does not match.
    """
    uri, listed = canonical_uri(uri), canonical_uri(listed)
    if not _is_glob(listed):
        return f"{_resolved(uri)}/".startswith(f"{_resolved(listed).rstrip('/')}/")
    folder, _, stem = _GLOB.split(listed, maxsplit=1)[0].rpartition("/")
    return f"{_resolved(uri)}/".startswith(f"{_resolved(folder).rstrip('/')}/{stem}")


def _resolved(uri: str) -> str:
    scheme, _, path = uri.partition("://")
    scheme = _SAME_SCHEME.get(scheme.lower(), scheme.lower())
    return f"{scheme}://{os.path.realpath(path or '/') if scheme == 'file' else path}"


def _is_glob(uri: str) -> bool:
    """Whether `list_files` may take the URI as a pattern. Never on the web, where `?` begins the query."""
    return _scheme(uri) not in {"http", "https"} and _GLOB.search(uri) is not None


def _scheme(uri: str) -> str:
    match = _SCHEME.match(uri)
    return match[1].lower() if match else "file"


def list_files(uri: str) -> Iterator[FileInfo]:
    """Every file under a prefix or folder and its subfolders, the matches of a glob, or the one file itself.

    A file of exactly that name comes first, then the folder, then the pattern: `*` and `?` stay within one
    folder's name, `**` crosses folders, `[...]` is a set. What stands before the first wildcard is listed
    and then matched. Folder markers are left out. Memory is flat on local disk and S3; elsewhere it holds
    one folder.

    Raises:
        StorageError: nothing is there (a pattern without a match is no error), or it may not be listed.
    """
    uri = canonical_uri(uri)
    if (file := _file_to_list(uri)) is not None:
        yield file
        return
    store = _store(uri)
    found = False
    for file in store.walk(uri, "", None):
        found = True
        if not file.uri.endswith("/"):
            yield file
    if found or attempt("list", uri, lambda: store.folder_exists(uri)):
        return
    if not _is_glob(uri):
        raise StorageError(f"cannot list {redact(uri)}: nothing is there; check the address")
    yield from _list_glob(uri)


def _file_to_list(uri: str) -> FileInfo | None:
    try:
        return stat(uri)
    except StorageError as error:
        # S3 refuses a HEAD without saying why; the listing that follows will be refused with the reason.
        if _store(uri) is s3 and isinstance(error.__cause__, PermissionError):
            return None
        raise


def _list_glob(uri: str) -> Iterator[FileInfo]:
    folder, _, stem = _GLOB.split(uri, maxsplit=1)[0].rpartition("/")
    pattern = uri[len(folder) + 1 :]
    try:
        matches = re.compile(glob_translate(pattern)).match
    except ValueError as error:
        raise StorageError(f"cannot list {redact(uri)}: {error}") from error
    depth = None if "**" in pattern else pattern.count("/")
    for file in _store(uri).walk(folder, stem, depth):
        if matches(file.uri[len(folder) + 1 :]) and not file.uri.endswith("/"):
            yield file


def lists_in_order(uri: str) -> bool:
    """Whether `list_files` finds several files under an address, and those in the order of their URIs.

    So it is on every filesystem of fsspec but local disk, whose folders are read as they lie there, and S3's
    directory buckets. A store that is said to page through its keys in order, and does not, is not found out here.
    """
    uri = canonical_uri(uri)
    return _store(uri).lists_in_order(uri) and _file_to_list(uri) is None


def list_names(uri: str) -> Iterator[str]:
    """The names directly in a folder, of files and of folders. None if the folder does not exist."""
    uri = canonical_uri(uri)
    yield from _store(uri).names(uri)


def stat(uri: str) -> FileInfo | None:
    """The file's size and version; None if there is no such file. A folder is no file."""
    uri = canonical_uri(uri)
    return attempt("read", uri, lambda: _store(uri).stat(uri))


def exists(uri: str) -> bool:
    """Whether there is a file of this name."""
    return stat(uri) is not None


def read_bytes(uri: str, offset: int = 0, size: int | None = None, *, etag: str | None = None) -> bytes:
    """At most `size` bytes from `offset` on, all if None; fewer where the file ends earlier.

    Raises:
        ChangedError: the store names another version than `etag`; only S3 is asked, as its answer is free.
        StorageError: it is not there, may not be read, or could not be read in `attempts.ATTEMPTS` attempts.
    """
    uri = canonical_uri(uri)
    if size == 0:
        return b""
    return attempt("read", uri, lambda: _store(uri).read(uri, offset, size, etag))


def open_input(uri: str, *, etag: str | None = None) -> BinaryIO:
    """A seekable file for readers that need a few ranges of a large object (Parquet, tar). Close it.

    Each range is one `read_bytes` of at least 256 KiB, with its retries and its check of `etag`. Not for
    several threads at once.
    """
    uri = canonical_uri(uri)
    if _store(uri) is local:
        return attempt("read", uri, lambda: local.open_file(uri))
    file = stat(uri)
    if file is None:
        raise StorageError(f"cannot read {redact(uri)}: nothing is there") from FileNotFoundError()
    if file.size is None:
        raise StorageError(f"cannot read {redact(uri)}: its server does not say how long it is")
    ranges = RangedFile(lambda offset, size: read_bytes(uri, offset, size, etag=etag), file.size)
    return io.BufferedReader(ranges, _READ_AHEAD_BYTES)


def arrow_filesystem(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """A filesystem for Arrow's readers on any address, and the address as its path.

    Local disk is read by Arrow alone. Elsewhere the filesystem opens files, with the attempts and errors of
    `open_input`, and does nothing else.
    """
    uri = canonical_uri(uri)
    if _store(uri) is local:
        return pyarrow.fs.LocalFileSystem(), local.path_of(uri)
    return _ranges_for_arrow(), uri


@cache
def _ranges_for_arrow() -> pyarrow.fs.FileSystem:
    # Held here: whoever lets the last reference go needs Python, and one of Arrow's threads must not at the end.
    return pyarrow.fs.PyFileSystem(ReadOnlyHandler(open_input, stat))


def write_atomic(uri: str, data: bytes | IO[bytes]) -> None:
    """Write the whole file or nothing: readers see what was there before, or all of `data`.

    On S3 it is one PUT, so 5 GiB at most. On local disk folders are made as needed, and a crash can leave a
    hidden `.NAME.*.tmp`, never a half file; so it is on the filesystems that `other` renames on, where a file that
    is replaced is missing for a moment. The others must put files whole by themselves, as object stores do.

    Args:
        uri: The file's.
        data: Bytes, or a seekable file, which is read from its beginning and on local disk and S3 in pieces.
    """
    uri = canonical_uri(uri)

    def write() -> None:
        file = io.BytesIO(data) if isinstance(data, bytes) else data
        file.seek(0)
        _store(uri).write(uri, file)

    attempt("write", uri, write)


def delete(uri: str) -> None:
    """Delete the file; nothing happens if it is not there."""
    uri = canonical_uri(uri)
    attempt("delete", uri, lambda: _store(uri).delete(uri))
