"""The main job, as end-to-end tests start and watch it."""

import json
import subprocess
import time
from pathlib import Path
from typing import Any

from running import KEEP_ALL, TIMEOUT_S


def job(tiny_checkpoint: Path, images: str | Path, output: str | Path, *flags: str) -> list[str | Path]:
    """The job's name and flags."""
    return [
        "jobs.generate_masks",
        "--images",
        images,
        "--output",
        output,
        "--checkpoint",
        tiny_checkpoint,
        *KEEP_ALL,
        *flags,
    ]


def summary_of(output: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((output / "summary.json").read_text())
    return document


def wait_for_shards(output: Path, count: int, process: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while len(list((output / "masks").glob("part-*.parquet"))) < count:
        assert process.poll() is None, "the job ended before it could be disturbed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
