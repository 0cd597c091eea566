"""Every other filesystem of fsspec, through the calls that they all have."""

import functools
import uuid
from collections.abc import Iterator
from contextlib import suppress
from typing import IO, Any, Final

import fsspec

from pipeline.storage.attempts import attempt, http_status
from pipeline.storage.files import FileInfo
from pipeline.storage.parallel import LISTERS, Listed, Request, in_order, listed

_RENAMING: Final = frozenset({"sftp", "ssh", "ftp", "smb", "hdfs", "arrow_hdfs", "webhdfs"})
"""Those that write a file bit by bit, and whose `mv` is a renaming."""


def stat(uri: str) -> FileInfo | None:
    fs, path = _filesystem(uri)
    try:
        entry = fs.info(path)
    except FileNotFoundError:
        return None
    return _file_info(uri, entry) if entry["type"] == "file" else None


def read(uri: str, offset: int, size: int | None, _etag: str | None) -> bytes:
    fs, path = _filesystem(uri)
    if offset == 0 and size is None:
        whole: bytes = fs.cat_file(path)
        return whole
    try:
        data: bytes = fs.cat_file(path, start=offset, end=None if size is None else offset + size)
    except Exception as error:
        if http_status(error) == 416:
            return b""  # the range begins after the end
        raise
    if size is not None and len(data) > size:  # a web server that does not know ranges sends all
        return data[offset : offset + size]
    return data


def write(uri: str, data: IO[bytes]) -> None:
    fs, path = _filesystem(uri)
    if uri.partition("://")[0].lower() not in _RENAMING:
        fs.pipe_file(path, data.read())
        return
    folder, _, name = path.rpartition("/")
    temporary = f"{folder}/.{name}.{uuid.uuid4().hex}.tmp"
    if folder:
        fs.makedirs(folder, exist_ok=True)
    try:
        fs.pipe_file(temporary, data.read())
        if fs.exists(path):  # most of them rename onto nothing only
            fs.rm_file(path)
        fs.mv(temporary, path)
    except BaseException:
        with suppress(Exception):  # it may be what failed
            fs.rm_file(temporary)
        raise


def delete(uri: str) -> None:
    fs, path = _filesystem(uri)
    if stat(uri) is not None:
        fs.rm_file(path)


def names(uri: str) -> Iterator[str]:
    for entry in attempt("list", uri, lambda: _entries(*_filesystem(uri))):
        yield entry["name"].rstrip("/").rpartition("/")[2]


def walk(uri: str, _stem: str, depth: int | None) -> Iterator[FileInfo]:
    fs, path = attempt("list", uri, lambda: _filesystem(uri))
    start = len(path)

    def below(folder: str) -> Listed:
        found: list[tuple[str, FileInfo | Request]] = []
        for entry in attempt("list", uri, functools.partial(_entries, fs, folder)):
            name = entry["name"][start:].lstrip("/")
            if entry["type"] != "directory":
                found.append((name, _file_info(f"{uri}{'' if uri.endswith('/') else '/'}{name}", entry)))
            elif depth is None or name.count("/") < depth:
                found.append((f"{name.rstrip('/')}/", functools.partial(below, entry["name"])))
        return in_order(found)

    # Those that are not asynchronous may hold one connection, as SFTP does.
    return listed(functools.partial(below, path), LISTERS if fs.async_impl else 1)


def lists_in_order(_uri: str) -> bool:
    return True


def folder_exists(uri: str) -> bool:
    fs, path = _filesystem(uri)
    return bool(fs.isdir(path))


def _filesystem(uri: str) -> tuple[Any, str]:
    fs, path = fsspec.url_to_fs(uri, use_listings_cache=False)
    return fs, path


def _file_info(uri: str, entry: dict[str, Any]) -> FileInfo:
    return FileInfo(uri, entry.get("size"), entry.get("ETag") or entry.get("etag"))


def _entries(fs: Any, folder: str) -> list[dict[str, Any]]:
    try:
        return [entry for entry in fs.ls(folder, detail=True) if entry["name"] != folder]
    except FileNotFoundError:
        return []
