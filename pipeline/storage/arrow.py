"""Arrow's door to storage: `pyarrow.dataset` reads through it, with our attempts and errors.

Arrow's threads let files go after a scan has returned. One that lets a file of Python's go while the interpreter
ends aborts the process: "terminate called without an active exception" (as in apache/arrow#34314). So the end
waits for them.
"""

import atexit
import io
import time
import weakref
from collections.abc import Callable
from typing import Any, BinaryIO, Final, NoReturn

import pyarrow as pa
import pyarrow.fs

from pipeline.storage.files import FileInfo

OpenInput = Callable[[str], BinaryIO]
Stat = Callable[[str], FileInfo | None]

_LAST_WAIT_S: Final = 1.0  # where a scan was broken off, its files stay open
_open_files: weakref.WeakSet[BinaryIO] = weakref.WeakSet()


@atexit.register
def _wait_for_arrow() -> None:
    """Until all files are let go, or the time is over."""
    deadline = time.monotonic() + _LAST_WAIT_S
    while _open_files and time.monotonic() < deadline:
        time.sleep(0.001)


class ReadOnlyHandler(pyarrow.fs.FileSystemHandler):
    """Opens files by their canonical URIs; lists and writes nothing. It can be sent to other processes."""

    def __init__(self, open_input: OpenInput, stat: Stat) -> None:
        self._open_input, self._stat = open_input, stat

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ReadOnlyHandler)

    def __hash__(self) -> int:
        return hash(ReadOnlyHandler)

    def __reduce__(self) -> tuple[type["ReadOnlyHandler"], tuple[OpenInput, Stat]]:
        return ReadOnlyHandler, (self._open_input, self._stat)

    def get_type_name(self) -> str:
        """What Arrow calls it."""
        return "everymask"

    def normalize_path(self, path: str) -> str:
        """The path as it is: a canonical URI."""
        return path

    def get_file_info(self, paths: str | list[str]) -> list[pyarrow.fs.FileInfo]:
        """Type and size of each file."""
        return [_info(path, self._stat(path)) for path in ([paths] if isinstance(paths, str) else paths)]

    def open_input_file(self, path: str) -> pa.NativeFile:
        """A file to read ranges of."""
        file: Any = self._open_input(path)
        _open_files.add(file)
        return pa.PythonFile(file, mode="r")

    def open_input_stream(self, path: str) -> pa.NativeFile:
        """The same."""
        return self.open_input_file(path)

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        """What Arrow's interface also has and no reader calls: listing and writing are `storage`'s."""
        raise io.UnsupportedOperation(
            "everymask's filesystem for Arrow opens files to read, and does nothing else"
        )

    get_file_info_selector = _refuse
    create_dir = delete_dir = delete_dir_contents = delete_root_dir_contents = _refuse
    delete_file = move = copy_file = open_output_stream = open_append_stream = _refuse


def _info(path: str, file: FileInfo | None) -> pyarrow.fs.FileInfo:
    if file is None:
        return pyarrow.fs.FileInfo(path, pyarrow.fs.FileType.NotFound)
    return pyarrow.fs.FileInfo(path, pyarrow.fs.FileType.File, size=file.size)
