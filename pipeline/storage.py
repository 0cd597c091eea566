"""Storage: list, read ranges, write whole files, on local disk and on everything that fsspec reaches.

An address is a local path or one fsspec URI (`s3://bucket/key`, `gs://...`, `https://...`). Nothing in it
is percent-decoded or encoded: after `s3://bucket/` stands the key, after `file://` the path. Slashes at the
end do not count, so a key that ends in `/` (a folder marker) cannot be named.

Local disk and S3 have their own code here, because fsspec's general calls hold a whole listing in memory,
read `?versionId=` out of keys and ask twice before they read once. The rest goes through fsspec's calls.

Every function raises `StorageError`, with the address and the cause, and without the credentials that
may be in either. What may pass by itself (time-outs, resets, throttling, 5xx) is tried again first.
"""

import errno
import functools
import io
import os
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple, TypeVar

import fsspec
import tenacity
from fsspec.asyn import sync
from fsspec.utils import glob_translate

from pipeline.errors import StorageError

ATTEMPTS: Final = 8
"""How often a transient failure is tried in all."""
ATTEMPTS_TOTAL_S: Final = 60.0
"""Seconds after the first attempt in which another may begin."""
FIRST_WAIT_S: Final = 0.25
"""The wait before the second attempt; it doubles up to `LONGEST_WAIT_S`, and up to `JITTER_S` is added."""
LONGEST_WAIT_S: Final = 10.0
JITTER_S: Final = 0.5

_CONNECT_TIMEOUT_S: Final = 10
_READ_TIMEOUT_S: Final = 60
_CONNECTIONS: Final = 64
_READ_AHEAD_BYTES: Final = 256 * 1024

_TRANSIENT_STATUS: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
_TRANSIENT_ERRNO: Final = frozenset({errno.EBUSY, errno.EAGAIN, errno.EREMOTEIO, errno.ETIMEDOUT})
_THROTTLED: Final = re.compile("SlowDown|Throttl|RequestLimitExceeded|RequestTimeout|InternalError")
# By name, since botocore, aiohttp, gcsfs and adlfs need not be installed.
_TRANSIENT_NAMES: Final = frozenset(
    {
        "ConnectionError",
        "TimeoutError",
        "HTTPClientError",
        "ClientConnectionError",
        "ClientPayloadError",
        "IncompleteRead",
        "IncompleteReadError",
        "ResponseParserError",
        "ResponseStreamingError",
        "ServiceRequestError",
        "ServiceResponseError",
    }
)

_SCHEME: Final = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://")
_BUCKET: Final = re.compile(r"[a-zA-Z0-9._-]+")
_GLOB: Final = re.compile(r"[*?\[]")
_USERINFO: Final = re.compile(r"://(?:[^/@:\s]*:(?!\d+/)[^@\s]*@|(?<=https://)[^/@\s]*@|(?<=http://)[^/@\s]*@)")
_SECRET_PARAMETER: Final = re.compile(
    r"([?&;][^=&\s]*(?:sig|token|credential|secret|password|key|auth)[^=&\s]*=)[^&\s'\"]+", re.IGNORECASE
)

T = TypeVar("T")


class FileInfo(NamedTuple):
    """One file: its canonical URI, its size in bytes, its version; None where the store does not say."""

    uri: str
    size: int | None
    etag: str | None


class ChangedError(StorageError):
    """The object under the address is not the version that was asked for."""


def canonical_uri(address: str) -> str:
    """The one spelling of an address: local paths become absolute `file:///...`, slashes at the end go."""
    scheme = _scheme(address)
    if scheme in {"file", "local"}:
        return "file://" + os.path.abspath(address.removeprefix(f"{scheme}://"))  # noqa: PTH100 (folds `..` too)
    if scheme in {"http", "https"}:
        return address
    head, _, path = address.partition("://")
    return f"{head}://{path.rstrip('/')}"


def redact(text: str) -> str:
    """The URI or message without passwords, keys and signatures."""
    return _SECRET_PARAMETER.sub(r"\1***", _USERINFO.sub("://***@", text))


def is_glob(uri: str) -> bool:
    """Whether `list_files` may take the URI as a pattern. Never on the web, where `?` begins the query."""
    return _scheme(uri) not in {"http", "https"} and _GLOB.search(uri) is not None


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
    found = False
    for file in _list_folder(uri):
        found = True
        if not file.uri.endswith("/"):
            yield file
    if found or _folder_exists(uri):
        return
    if not is_glob(uri):
        raise StorageError(f"cannot list {redact(uri)}: nothing is there; check the address")
    yield from _list_glob(uri)


def _file_to_list(uri: str) -> FileInfo | None:
    try:
        return stat(uri)
    except StorageError as error:
        # S3 refuses a HEAD without saying why; the listing that follows will be refused with the reason.
        if _is_s3(uri) and isinstance(error.__cause__, PermissionError):
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
    for file in _list_folder(folder, stem, depth):
        if matches(file.uri[len(folder) + 1 :]) and not file.uri.endswith("/"):
            yield file


def list_names(uri: str) -> Iterator[str]:
    """The names directly in a folder, of files and of folders. None if the folder does not exist."""
    uri = canonical_uri(uri)
    if _is_local(uri):
        yield from _attempt("list", uri, lambda: _local_names(_local(uri)))
    elif _is_s3(uri):
        yield from _s3_names(uri)
    else:
        yield from _attempt("list", uri, lambda: _other_names(uri))


def stat(uri: str) -> FileInfo | None:
    """The file's size and version; None if there is no such file. A folder is no file."""
    uri = canonical_uri(uri)
    if _is_local(uri):
        return _attempt("read", uri, lambda: _local_stat(uri))
    if _is_s3(uri):
        return _attempt("read", uri, lambda: _s3_stat(uri))
    return _attempt("read", uri, lambda: _other_stat(uri))


def exists(uri: str) -> bool:
    """Whether there is a file of this name."""
    return stat(uri) is not None


def read_bytes(uri: str, offset: int = 0, size: int | None = None, *, etag: str | None = None) -> bytes:
    """At most `size` bytes from `offset` on, all if None; fewer where the file ends earlier.

    Raises:
        ChangedError: the store names another version than `etag`; only S3 is asked, as its answer is free.
        StorageError: it is not there, may not be read, or could not be read in `ATTEMPTS` attempts.
    """
    uri = canonical_uri(uri)
    if size == 0:
        return b""
    if _is_local(uri):
        return _attempt("read", uri, lambda: _local_read(_local(uri), offset, size))
    if _is_s3(uri):
        return _attempt("read", uri, lambda: _s3_read(uri, offset, size, etag))
    return _attempt("read", uri, lambda: _other_read(uri, offset, size))


def open_input(uri: str, *, etag: str | None = None) -> BinaryIO:
    """A seekable file for readers that need a few ranges of a large object (Parquet, tar). Close it.

    Each range is one `read_bytes` of at least 256 KiB, with its retries and its check of `etag`. Not for
    several threads at once.
    """
    uri = canonical_uri(uri)
    if _is_local(uri):
        return _attempt("read", uri, lambda: Path(_local(uri)).open("rb"))
    file = stat(uri)
    if file is None:
        raise StorageError(f"cannot read {redact(uri)}: nothing is there") from FileNotFoundError()
    if file.size is None:
        raise StorageError(f"cannot read {redact(uri)}: its server does not say how long it is")
    return io.BufferedReader(_Ranges(uri, file.size, etag), _READ_AHEAD_BYTES)


def write_atomic(uri: str, data: bytes) -> None:
    """Write the whole file or nothing: readers see what was there before, or all of `data`.

    On S3 it is one PUT, so 5 GiB at most. On local disk folders are made as needed, and a crash can leave a
    hidden `.NAME.*.tmp`, never a half file.
    """
    uri = canonical_uri(uri)
    if _is_local(uri):
        _attempt("write", uri, lambda: _local_write(Path(_local(uri)), data))
    elif _is_s3(uri):
        bucket, key = _s3_bucket_and_key(uri)
        _attempt("write", uri, lambda: _s3().call_s3("put_object", Bucket=bucket, Key=key, Body=data))
    else:
        _attempt("write", uri, lambda: _other(uri)[0].pipe_file(_other(uri)[1], data))


def delete(uri: str) -> None:
    """Delete the file; nothing happens if it is not there."""
    uri = canonical_uri(uri)
    if _is_local(uri):
        _attempt("delete", uri, lambda: Path(_local(uri)).unlink(missing_ok=True))
    elif _is_s3(uri):
        bucket, key = _s3_bucket_and_key(uri)
        _attempt("delete", uri, lambda: _s3().call_s3("delete_object", Bucket=bucket, Key=key))
    elif exists(uri):
        _attempt("delete", uri, lambda: _other(uri)[0].rm_file(_other(uri)[1]))


# Which store


def _scheme(uri: str) -> str:
    match = _SCHEME.match(uri)
    return match[1].lower() if match else "file"


def _is_local(uri: str) -> bool:
    return uri.startswith("file://")


def _is_s3(uri: str) -> bool:
    return uri.startswith(("s3://", "s3a://"))


def _list_folder(uri: str, stem: str = "", depth: int | None = None) -> Iterator[FileInfo]:
    """Every file below a folder, on S3 with the folder markers, whose URIs end in `/`.

    `stem` (names begin with it) and `depth` (folders below this one) may be used to list less.
    """
    if _is_local(uri):
        yield from _local_walk(_local(uri) or "/", depth)
    elif _is_s3(uri):
        yield from _s3_walk(uri, stem)
    else:
        yield from _other_walk(uri, depth)


def _folder_exists(uri: str) -> bool:
    """Asked where a listing was empty: on S3 only a bucket itself can be an empty folder."""
    if _is_local(uri):
        return Path(_local(uri)).is_dir()
    if _is_s3(uri):
        return _s3_bucket_and_key(uri)[1] == ""
    fs, path = _other(uri)
    return bool(_attempt("list", uri, lambda: fs.isdir(path)))


# Attempts


def _attempt(verb: str, uri: str, call: Callable[[], T]) -> T:
    """The result of `call`, tried again while it fails in a way that may pass."""
    attempts = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_is_transient),
        wait=tenacity.wait_exponential(FIRST_WAIT_S, max=LONGEST_WAIT_S) + tenacity.wait_random(0, JITTER_S),
        stop=tenacity.stop_after_attempt(ATTEMPTS) | tenacity.stop_after_delay(ATTEMPTS_TOTAL_S),
        reraise=True,
    )
    try:
        return attempts(call)
    except StorageError:
        raise
    except Exception as error:
        times = f" after {attempts.statistics['attempt_number']} attempts" if _is_transient(error) else ""
        cause = redact(f"{type(error).__name__}: {error}")
        failure = StorageError(f"cannot {verb} {redact(uri)}{times}: {cause}{_advice(error)}")
        if redact(str(error)) != str(error):
            raise failure from None  # a traceback would print the cause, and with it the credentials
        raise failure from error


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, StorageError | FileNotFoundError | PermissionError):
        return False
    names = {cls.__name__ for cls in type(error).__mro__}
    if names & _TRANSIENT_NAMES or getattr(error, "errno", None) in _TRANSIENT_ERRNO:
        return True
    cause = error.__cause__ or error  # s3fs raises an OSError from botocore's error, which has the response
    return _http_status(cause) in _TRANSIENT_STATUS or _THROTTLED.search(str(cause)) is not None


def _http_status(error: BaseException) -> int | None:
    """The response's status, wherever botocore, aiohttp, gcsfs or adlfs keeps it."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return status if isinstance(status, int) else None
    numbers = (getattr(error, name, None) for name in ("status", "status_code", "code"))
    return next((number for number in numbers if isinstance(number, int)), None)


def _advice(error: BaseException) -> str:
    if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
        return "; check the credentials, and that they may list, read or write this address"
    if isinstance(error, FileNotFoundError):
        return "; check the address"
    if isinstance(error, ImportError):
        return "; install the fsspec package for this kind of address, for example everymask[s3]"
    if isinstance(error, ConnectionError) or "ConnectionError" in {c.__name__ for c in type(error).__mro__}:
        return "; check the endpoint and the network"
    return ""


class _Ranges(io.RawIOBase):
    """An object as a seekable raw file of ranged reads."""

    def __init__(self, uri: str, size: int, etag: str | None) -> None:
        super().__init__()
        self._uri, self._size, self._etag, self._at = uri, size, etag, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        size = min(len(buffer), self._size - self._at)
        if size <= 0:
            return 0
        data = read_bytes(self._uri, self._at, size, etag=self._etag)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


# Local disk


def _local(uri: str) -> str:
    return uri.removeprefix("file://")


def _local_walk(
    folder: str, depth: int | None, above: frozenset[tuple[int, int]] = frozenset()
) -> Iterator[FileInfo]:
    """Links to folders are followed, but not back to a folder on the way here, whose inodes are `above`."""
    try:
        with os.scandir(folder) as entries:
            here = os.stat(folder)  # noqa: PTH116 (plain strings, as scandir's: no Path for each of millions)
            above |= {(here.st_dev, here.st_ino)}
            for entry in entries:
                if entry.is_file():
                    with suppress(FileNotFoundError):  # removed since
                        yield FileInfo(f"file://{entry.path}", entry.stat().st_size, None)
                elif entry.is_dir() and depth != 0:
                    below = entry.stat()
                    if (below.st_dev, below.st_ino) not in above:
                        yield from _local_walk(entry.path, None if depth is None else depth - 1, above)
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError(f"cannot list {folder}: {error}{_advice(error)}") from error


def _local_names(folder: str) -> list[str]:
    try:
        return [entry.name for entry in os.scandir(folder)]
    except FileNotFoundError:
        return []


def _local_stat(uri: str) -> FileInfo | None:
    path = Path(_local(uri))
    return FileInfo(uri, path.stat().st_size, None) if path.is_file() else None


def _local_read(path: str, offset: int, size: int | None) -> bytes:
    with Path(path).open("rb") as file:
        file.seek(offset)
        return file.read(-1 if size is None else size)


def _local_write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # or a power cut may undo the renaming
    finally:
        os.close(folder)


# S3


@functools.cache
def _s3() -> Any:
    """One client for all threads: its calls run on fsspec's own loop. Only `_attempt` retries."""
    fs = fsspec.filesystem(
        "s3",
        skip_instance_cache=True,
        use_listings_cache=False,
        config_kwargs={
            "retries": {"total_max_attempts": 1},
            "connect_timeout": _CONNECT_TIMEOUT_S,
            "read_timeout": _READ_TIMEOUT_S,
            "max_pool_connections": _CONNECTIONS,
        },
    )
    fs.retries = 1
    return fs


os.register_at_fork(after_in_child=_s3.cache_clear)


def _s3_bucket_and_key(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.partition("://")[2].partition("/")
    if not _BUCKET.fullmatch(bucket):  # as in `key:secret@bucket`, which botocore's message would repeat
        raise StorageError(f"{redact(uri)} does not begin with a bucket's name; credentials belong elsewhere")
    return bucket, key


def _s3_stat(uri: str) -> FileInfo | None:
    bucket, key = _s3_bucket_and_key(uri)
    if not key:
        return None
    try:
        head = _s3().call_s3("head_object", Bucket=bucket, Key=key)
    except FileNotFoundError:
        return None
    return FileInfo(uri, head["ContentLength"], head.get("ETag"))


def _s3_read(uri: str, offset: int, size: int | None, etag: str | None) -> bytes:
    bucket, key = _s3_bucket_and_key(uri)
    ranged: dict[str, str] = {}
    if offset or size is not None:
        ranged["Range"] = f"bytes={offset}-{'' if size is None else offset + size - 1}"
    fs = _s3()
    try:
        response = fs.call_s3("get_object", Bucket=bucket, Key=key, **ranged)
    except OSError as error:
        if _http_status(error.__cause__ or error) == 416:  # the range begins after the end
            return b""
        raise
    found = response.get("ETag")
    if etag is not None and found is not None and found.strip('"') != etag.strip('"'):
        fs.loop.call_soon_threadsafe(response["Body"].close)
        raise ChangedError(f"{redact(uri)} has changed: it was version {etag} and is {found}")
    data: bytes = sync(fs.loop, _s3_body, response["Body"])
    return data


async def _s3_body(body: Any) -> bytes:
    try:
        data: bytes = await body.read()
        return data
    finally:
        body.close()


def _s3_pages(uri: str, stem: str = "", **request: str) -> Iterator[dict[str, Any]]:
    """The listing below a folder, a page of at most 1,000 keys at a time, in the order of the keys."""
    bucket, key = _s3_bucket_and_key(uri)
    request |= {"Bucket": bucket, "Prefix": f"{key}/{stem}" if key else stem}
    while True:
        page = _attempt("list", uri, lambda: _s3().call_s3("list_objects_v2", **request))
        yield page
        if not page.get("IsTruncated"):
            return
        request["ContinuationToken"] = page["NextContinuationToken"]


def _s3_walk(uri: str, stem: str) -> Iterator[FileInfo]:
    root = "/".join(uri.split("/", 3)[:3])
    for page in _s3_pages(uri, stem):
        for item in page.get("Contents", ()):
            yield FileInfo(f"{root}/{item['Key']}", item["Size"], item.get("ETag"))


def _s3_names(uri: str) -> Iterator[str]:
    for page in _s3_pages(uri, Delimiter="/"):
        start = len(page.get("Prefix", ""))
        for item in page.get("Contents", ()):
            if name := item["Key"][start:]:
                yield name
        for item in page.get("CommonPrefixes", ()):
            yield item["Prefix"][start:-1]


# Every other filesystem of fsspec


def _other(uri: str) -> tuple[Any, str]:
    fs, path = fsspec.url_to_fs(uri, use_listings_cache=False)
    return fs, path


def _other_stat(uri: str) -> FileInfo | None:
    fs, path = _other(uri)
    try:
        info = fs.info(path)
    except FileNotFoundError:
        return None
    return _other_info(uri, info) if info["type"] == "file" else None


def _other_info(uri: str, info: dict[str, Any]) -> FileInfo:
    return FileInfo(uri, info.get("size"), info.get("ETag") or info.get("etag"))


def _other_read(uri: str, offset: int, size: int | None) -> bytes:
    fs, path = _other(uri)
    if offset == 0 and size is None:
        whole: bytes = fs.cat_file(path)
        return whole
    try:
        data: bytes = fs.cat_file(path, start=offset, end=None if size is None else offset + size)
    except Exception as error:
        if _http_status(error) == 416:
            return b""  # the range begins after the end
        raise
    if size is not None and len(data) > size:  # a web server that does not know ranges sends all
        return data[offset : offset + size]
    return data


def _other_walk(uri: str, depth: int | None) -> Iterator[FileInfo]:
    fs, path = _attempt("list", uri, lambda: _other(uri))
    start = len(path)
    folders = [path]
    while folders:
        for entry in _attempt("list", uri, functools.partial(_other_entries, fs, folders.pop())):
            below = entry["name"][start:].lstrip("/")
            if entry["type"] != "directory":
                yield _other_info(f"{uri}{'' if uri.endswith('/') else '/'}{below}", entry)
            elif depth is None or below.count("/") < depth:
                folders.append(entry["name"])


def _other_entries(fs: Any, folder: str) -> list[dict[str, Any]]:
    try:
        return [entry for entry in fs.ls(folder, detail=True) if entry["name"] != folder]
    except FileNotFoundError:
        return []


def _other_names(uri: str) -> list[str]:
    fs, path = _other(uri)
    return [entry["name"].rstrip("/").rpartition("/")[2] for entry in _other_entries(fs, path)]
