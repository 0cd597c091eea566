"""One of two workers is frozen, as by a machine that hangs: the other one makes its shards and the run ends."""

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from running import TIMEOUT_S, call, command, ray_workers, rows, write_jpegs
from runs_of_masks import job, summary_of, wait_for_shards

pytestmark = pytest.mark.alone
IMAGES, PER_SHARD = 96, 4


def freeze_a_worker(process: subprocess.Popen[str]) -> int:
    """Stop one that is in the midst of a call, for good. Its process."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        for worker in ray_workers(process.pid, "ShardWorker)).submit"):
            os.kill(worker.pid, signal.SIGSTOP)
            return worker.pid
    pytest.fail("no worker could be frozen")


def test_a_frozen_worker_is_not_waited_for(tmp_path: Path, tiny_checkpoint: Path) -> None:
    folder = write_jpegs(tmp_path / "in", IMAGES)
    output = tmp_path / "out"
    flags = job(tiny_checkpoint, folder, output, "--images-per-shard", str(PER_SHARD))
    process = subprocess.Popen(
        command(*flags, "--num-workers", "2", "--cpus-per-worker", "1"), stderr=subprocess.PIPE, text=True
    )
    wait_for_shards(output, 1, process)
    frozen = freeze_a_worker(process)
    finished = len(list((output / "masks").glob("part-*.parquet")))
    try:
        _, stderr = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
        with contextlib.suppress(ProcessLookupError):  # Ray has ended it
            os.kill(frozen, signal.SIGKILL)
    assert process.returncode == 0, stderr
    assert finished < IMAGES // PER_SHARD
    assert f"complete: {IMAGES} images = {IMAGES} ok" in stderr
    assert summary_of(output)["missing_shards"] == []
    assert [row["image_id"] for row in rows(output)] == list(range(IMAGES))
    verified = call("jobs.verify_masks", "--output", output)
    assert verified.returncode == 0, verified.stderr
