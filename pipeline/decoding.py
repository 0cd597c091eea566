"""Decoding in processes of its own, which an image may take down: nothing else goes with them.

A decoder is written in C. Bytes that it does not expect can make it segfault, hang, or take all memory, and no
`except` helps. A worker has a model that took long to load and a shard that is half done, so it hands bytes to a
child over a socket, and gets pixels back.

The kernel keeps the limits, so neither process has to cooperate: an alarm that nothing handles ends a child that
takes too long, even where the worker is gone, and RLIMIT_DATA makes memory run out for the child alone. An image
at which a child died is tried once more, in a new one, because a child may also be killed from outside.
"""

import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ImageError
from pipeline.images import decode_image
from schemas.masks import Status

if TYPE_CHECKING:  # a child does without pydantic
    from pipeline.config import ImagesConfig

_TRIES: Final = 2
_READY: Final = b"+"
_SIZE: Final = struct.Struct("!Q")  # before a message, its bytes


class Decoders:
    """Decodes as `decode_image` does, in child processes. Several threads may call it at once.

    There are as many children as images in decoding at once; they are started when they are first needed and kept
    until `close`, or until this process ends, however it does.

    Args:
        limits: `max_pixels`, and time and memory for one image.
    """

    def __init__(self, limits: "ImagesConfig") -> None:
        self._limits = limits
        self._idle: deque[_Child] = deque()

    def __call__(self, data: bytes) -> NDArray[np.uint8]:
        """Decode one image file, to rgb_HW3.

        Raises:
            ImageError: as `decode_image`; `decoder_crash`, `timeout` or `out_of_memory` where a child died of it.
            RuntimeError: a child does not even start.
        """
        exit_code = 0
        for attempt in range(_TRIES):
            child = self._child(new=attempt > 0)
            try:
                rgb_HW3 = child.decode(data)
            except _Death as death:
                exit_code = death.exit_code
            except ImageError:
                self._idle.append(child)
                raise
            else:
                self._idle.append(child)
                return rgb_HW3
        raise _after_deaths(exit_code, self._limits)

    def close(self) -> None:
        """End the children. No call may be under way."""
        while self._idle:
            self._idle.pop().end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _child(self, *, new: bool) -> "_Child":
        if not new:
            with suppress(IndexError):
                return self._idle.pop()
        return _Child(self._limits)


class _Death(Exception):
    """A child is no more."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"exit code {exit_code}")
        self.exit_code = exit_code


class _Answer(NamedTuple):
    """A child's, as JSON. Pixels follow where the status is OK."""

    status: Status
    error: str = ""
    height: int = 0
    width: int = 0


class _Child:
    """The parent's end of a child, which decodes one image at a time."""

    def __init__(self, limits: "ImagesConfig") -> None:
        self._connection, theirs = socket.socketpair()
        self._answers = self._connection.makefile("rb")
        arguments = [theirs.fileno(), limits.max_pixels, limits.decode_timeout, int(limits.decode_memory)]
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603 (this program)
                [sys.executable, "-P", "-m", "pipeline.decoding", *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                # Where modules are found, Ray tells a worker after its start. BLAS, unused, would hold memory.
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"},
            )
        if self._answers.read(1) != _READY:
            raise RuntimeError(f"no decoder could be started: it ended with exit code {self.end()}")

    def decode(self, data: bytes) -> NDArray[np.uint8]:
        """As `Decoders`, but raises `_Death` where the child ends."""
        with suppress(BrokenPipeError, ConnectionResetError):
            _send(self._connection, data)
            if (message := _receive(self._answers)) is not None:
                answer = _Answer(*json.loads(message))
                if answer.status != Status.OK:
                    raise ImageError(Status(answer.status), answer.error)
                rgb_HW3 = np.empty((answer.height, answer.width, 3), np.uint8)
                if self._answers.readinto(rgb_HW3.data) == rgb_HW3.nbytes:
                    return rgb_HW3
        raise _Death(self.end())

    def end(self) -> int:
        """Close the connection, at which a child ends. Return its exit code."""
        self._answers.close()
        self._connection.close()
        return self._process.wait()


def _after_deaths(exit_code: int, limits: "ImagesConfig") -> ImageError:
    """What an image is at which `_TRIES` children died, the last of them so."""
    if exit_code == -signal.SIGALRM:
        message = f"decoding took more than {limits.decode_timeout:g} seconds, twice; --decode-timeout allows more"
        return ImageError(Status.TIMEOUT, message)
    if exit_code == -signal.SIGKILL:
        message = "its decoder was killed, twice, as happens where the machine's memory runs out"
        return ImageError(Status.OUT_OF_MEMORY, message)
    how = f"by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"with exit code {exit_code}"
    return ImageError(Status.DECODER_CRASH, f"its decoder ended {how}, twice")


def _send(connection: socket.socket, message: bytes) -> None:
    connection.sendall(_SIZE.pack(len(message)))
    connection.sendall(message)


def _receive(messages: BinaryIO) -> bytes | None:
    """The next message; None where the other end was closed before it was whole."""
    header = messages.read(_SIZE.size)
    if len(header) < _SIZE.size:
        return None
    (size,) = _SIZE.unpack(header)
    message = messages.read(size)
    return message if len(message) == size else None


def _serve(connection: socket.socket, max_pixels: int, seconds: float, memory: int) -> None:
    """A child's life, until its parent closes the connection."""
    requests = connection.makefile("rb")
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    connection.sendall(_READY)
    while (data := _receive(requests)) is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (_at_most(memory + len(data), most), most))
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            rgb_HW3 = decode_image(data, max_pixels=max_pixels)
            answer = _Answer(Status.OK, "", *rgb_HW3.shape[:2])
        except ImageError as error:
            rgb_HW3 = np.empty(0, np.uint8)
            answer = _Answer(error.status, str(error))
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
        _send(connection, json.dumps(answer).encode())
        connection.sendall(rgb_HW3.data)
        del data, rgb_HW3  # the next image has the memory for itself


def _at_most(limit: int, most: int) -> int:
    return limit if most == resource.RLIM_INFINITY else min(limit, most)


def _main(file: str, max_pixels: str, seconds: str, memory: str) -> None:
    """Be a child. The arguments are those of the command line."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError):  # Linux: whoever makes memory run out, this process is killed first
        Path("/proc/self/oom_score_adj").write_text("1000")
    with socket.socket(fileno=int(file)) as connection, suppress(BrokenPipeError, ConnectionResetError):
        _serve(connection, int(max_pixels), float(seconds), int(memory))


if __name__ == "__main__":
    _main(*sys.argv[1:])
