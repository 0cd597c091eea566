"""A file seen from outside: what a store says of it, and one that is read in ranges."""

import io
from collections.abc import Callable
from typing import Any, NamedTuple


class FileInfo(NamedTuple):
    """One file: its canonical URI, its size in bytes, its version; None where the store does not say."""

    uri: str
    size: int | None
    etag: str | None


class RangedFile(io.RawIOBase):
    """`size` bytes as a seekable raw file, of which `read(offset, size)` reads a range."""

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        super().__init__()
        self._read_range, self._size, self._at = read, size, 0

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
        data = self._read_range(self._at, size)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
