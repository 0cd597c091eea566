"""The main job submitted to a Ray head, and stopped there."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import TIMEOUT_S, command, processes_with, rows, write_jpegs
from runs_of_masks import job, summary_of

pytestmark = pytest.mark.alone


@pytest.fixture
def ray_head(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A Ray head on loopback, and the environment that leads `ray job submit` to it."""
    temp = f"/tmp/ray-{uuid.uuid4().hex[:8]}"  # a socket's path is at most 107 bytes long
    port = free_port()
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex * 2}
    loopback = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    with (tmp_path / "head.log").open("w") as log:
        head = subprocess.Popen(
            [
                *(Path(sys.executable).parent / "ray", "start", "--head", "--block", "--num-cpus=2"),
                *("--port=0", f"--dashboard-port={port}", f"--temp-dir={temp}"),
                *("--dashboard-host=127.0.0.1", "--node-ip-address=127.0.0.1"),
            ],
            env=os.environ | token | loopback,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        yield token | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{port}"}
    finally:
        head.kill()
        head.wait()
        for process in processes_with(temp):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        shutil.rmtree(temp, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def submit(*words: str | Path) -> list[str | Path]:
    """A `ray job submit` of this project's folder."""
    return [
        *(Path(sys.executable).parent / "ray", "job", "submit"),
        *("--working-dir", Path(__file__).parent.parent),
        *("--runtime-env-json", json.dumps({"excludes": [".venv", "demo-output", ".git"]})),
        *words,
    ]


def ray(head: dict[str, str], *words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, check=False, capture_output=True, text=True, timeout=TIMEOUT_S, env=os.environ | head
    )


def test_case_45_ray_job_submit_and_stop(tmp_path: Path, tiny_checkpoint: Path, ray_head: dict[str, str]) -> None:
    folder = write_jpegs(tmp_path / "in", 4)
    output = tmp_path / "out"
    whole = submit("--", *command(*job(tiny_checkpoint, folder, output, "--images-per-shard", "2")))
    deadline = time.monotonic() + 120
    while (submitted := ray(ray_head, *whole)).returncode and time.monotonic() < deadline:
        time.sleep(1)  # the head is not up yet
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert "complete: 4 images = 4 ok" in submitted.stdout + submitted.stderr
    assert [row["status"] for row in rows(output)] == ["ok"] * 4

    folder = write_jpegs(tmp_path / "many", 400)
    output = tmp_path / "stopped"
    flags = job(tiny_checkpoint, folder, output, "--images-per-shard", "2")
    begun = ray(ray_head, *submit("--no-wait", "--submission-id", "long", "--", *command(*flags)))
    assert begun.returncode == 0, begun.stdout + begun.stderr
    deadline = time.monotonic() + TIMEOUT_S
    while len(list((output / "masks").glob("part-*.parquet"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    stopped = ray(ray_head, Path(sys.executable).parent / "ray", "job", "stop", "long")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    time.sleep(2)  # for a worker that has not heard of it yet
    finished = len(list((output / "masks").glob("part-*.parquet")))
    assert 3 <= finished < 200
    summary = summary_of(output)
    assert summary["state"] == "interrupted"
    assert summary["ok"] == 2 * finished
    assert summary["not_done"] == 400 - summary["ok"]
