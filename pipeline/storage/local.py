"""Local disk."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, BinaryIO

from pipeline.errors import StorageError
from pipeline.storage.attempts import advice, attempt
from pipeline.storage.files import FileInfo


def stat(uri: str) -> FileInfo | None:
    path = Path(path_of(uri))
    return FileInfo(uri, path.stat().st_size, None) if path.is_file() else None


def read(uri: str, offset: int, size: int | None, _etag: str | None) -> bytes:
    with open_file(uri) as file:
        file.seek(offset)
        return file.read(-1 if size is None else size)


def open_file(uri: str) -> BinaryIO:
    return Path(path_of(uri)).open("rb")


def write(uri: str, data: IO[bytes]) -> None:
    path = Path(path_of(uri))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            shutil.copyfileobj(data, file)
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


def delete(uri: str) -> None:
    Path(path_of(uri)).unlink(missing_ok=True)


def names(uri: str) -> Iterator[str]:
    yield from attempt("list", uri, lambda: _names(path_of(uri)))


def walk(uri: str, _stem: str, depth: int | None) -> Iterator[FileInfo]:
    return _walk(path_of(uri) or "/", depth, frozenset())


def lists_in_order(_uri: str) -> bool:
    return False


def folder_exists(uri: str) -> bool:
    return Path(path_of(uri)).is_dir()


def path_of(uri: str) -> str:
    return uri.removeprefix("file://")


def _names(folder: str) -> list[str]:
    try:
        return [entry.name for entry in os.scandir(folder)]
    except FileNotFoundError:
        return []


def _walk(folder: str, depth: int | None, above: frozenset[tuple[int, int]]) -> Iterator[FileInfo]:
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
                        yield from _walk(entry.path, None if depth is None else depth - 1, above)
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError(f"cannot list {folder}: {error}{advice(error)}") from error
