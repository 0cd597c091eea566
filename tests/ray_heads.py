"""A Ray head on loopback, in processes of its own."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from running import TIMEOUT_S, processes_with


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def session_folder() -> str:
    """A new name for --temp-dir; a socket's path is at most 107 bytes long."""
    return f"/tmp/ray-{uuid.uuid4().hex[:8]}"


@contextlib.contextmanager
def one_machine(folder: Path) -> Iterator[dict[str, str]]:
    """A cluster of one machine with two CPUs, as the environment that leads commands to it.

    A command that starts a Ray of its own takes a third more CPU time.
    """
    temp, port = session_folder(), free_port()
    both = {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": uuid.uuid4().hex * 2,
    }
    words = [
        *(Path(sys.executable).parent / "ray", "start", "--head", "--block", "--num-cpus=2", f"--port={port}"),
        *(f"--temp-dir={temp}", "--include-dashboard=false", "--node-ip-address=127.0.0.1"),
    ]
    with head_of(words, temp, folder / "head.log", {"RAY_USAGE_STATS_ENABLED": "0"} | both):
        yield both | {"RAY_ADDRESS": f"127.0.0.1:{port}"}


@contextlib.contextmanager
def head_of(words: Sequence[str | Path], temp: str, log: Path, environment: Mapping[str, str]) -> Iterator[None]:
    """A head that is up, by a `ray start --head --block` with that --temp-dir; ends with all it started."""
    with log.open("w") as file:
        head = subprocess.Popen(words, env=os.environ | environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + TIMEOUT_S
        while "Ray runtime started" not in log.read_text():
            assert head.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield
    finally:
        head.kill()
        head.wait()
        for process in processes_with(temp):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        shutil.rmtree(temp, ignore_errors=True)
