"""Running the commands as a user does, on pictures made here."""

import contextlib
import importlib
import io
import logging
import os
import re
import signal
import subprocess
import sys
import time
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import skimage.data
import torch
from numpy.typing import NDArray
from PIL import Image

from jobs.command import run_command
from pipeline import run as runs
from pipeline.config import RunConfig
from pipeline.images import decode_image
from pipeline.model import load_model
from pipeline.outcomes import Decode
from pipeline.predict import content_of, weights_of
from pipeline.run import Run
from pipeline.shard import make_shard

# Untrained weights are confident and stable nowhere: keep everything.
KEEP_ALL = [
    *("--pred-iou-thresh", "-10"),
    *("--stability-score-thresh", "0"),
    *("--box-nms-thresh", "1"),
    *("--points-per-side", "2"),
]
TIMEOUT_S = 600


def command(name: str, *flags: str | Path) -> list[str]:
    """`python -m NAME FLAGS`."""
    return [sys.executable, "-m", name, *map(str, flags)]


def run(name: str, *flags: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; its logs are on standard error."""
    return subprocess.run(
        command(name, *flags),
        check=False,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env=os.environ | environment,
    )


def call(name: str, *flags: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command in this process, which spares its imports; for what ends before it starts anything."""
    job = getattr(importlib.import_module(name), name.rpartition(".")[2])
    output, errors = io.StringIO(), io.StringIO()
    handler = logging.StreamHandler(errors)
    logging.getLogger().addHandler(handler)
    ours = logging.getLogger("everymask")
    level, terminated = ours.level, signal.getsignal(signal.SIGTERM)
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            run_command(job, name, [str(flag) for flag in flags])
    except SystemExit as ended:
        assert isinstance(ended.code, int)
        return subprocess.CompletedProcess(command(name, *flags), ended.code, output.getvalue(), errors.getvalue())
    finally:
        logging.getLogger().removeHandler(handler)
        ours.setLevel(level)
        signal.signal(signal.SIGTERM, terminated)


def kill_at_first_checkpoint(output: Path, name: str, *flags: str | Path) -> None:
    """Start a command that trains, and end it with SIGKILL as soon as `OUTPUT.training` is there."""
    process = subprocess.Popen(command(name, *flags), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + TIMEOUT_S
    while not Path(f"{output}.training").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the training ended before it could be killed"
    assert not output.exists()


class Process(NamedTuple):
    """A running process, as /proc shows it."""

    pid: int
    parent: int
    command: str


def processes_with(text: str) -> list[Process]:
    """Those with this text in their command lines."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended since
            words = (folder / "cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace")
            parent = re.search(r"^PPid:\s*(\d+)$", (folder / "status").read_text(), re.MULTILINE)
            if parent and text in words:
                found.append(Process(int(folder.name), int(parent[1]), words))
    return found


def ray_workers(driver: int, title: str) -> list[Process]:
    """Those with that title of a process's local Ray: their parent, Ray's own process, is its child."""
    children = {one.pid for one in processes_with("") if one.parent == driver}
    return [worker for worker in processes_with(title) if worker.parent in children]


def wait_for_ray_workers(driver: subprocess.Popen[Any], title: str, count: int) -> list[Process]:
    """The same, as soon as there are `count` of them."""
    deadline = time.monotonic() + TIMEOUT_S
    while len(workers := ray_workers(driver.pid, title)) != count:
        assert driver.poll() is None, f"the command ended with {len(workers)} workers seen, of {count}"
        assert time.monotonic() < deadline, f"{len(workers)} workers after {TIMEOUT_S} seconds, of {count}"
        time.sleep(0.05)
    return workers


def jpeg(index: int, size: tuple[int, int] = (96, 128)) -> bytes:
    """A piece of a photograph, another one for every index up to about 400."""
    photograph = _photograph(index % 3)
    height, width = size
    rows = photograph.shape[0] - height
    columns = photograph.shape[1] - width
    top, left = (index * 37) % rows, (index * 53) % columns
    buffer = io.BytesIO()
    Image.fromarray(photograph[top : top + height, left : left + width]).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@cache
def _photograph(index: int) -> NDArray[np.uint8]:
    photograph: NDArray[np.uint8] = (skimage.data.astronaut, skimage.data.coffee, skimage.data.rocket)[index]()
    return photograph


def write_jpegs(folder: Path, count: int) -> Path:
    """`count` pictures in a new folder."""
    folder.mkdir(parents=True)
    for index in range(count):
        (folder / f"{index:04d}.jpg").write_bytes(jpeg(index))
    return folder


def decode_here(config: RunConfig) -> Decode:
    """Decoding in this process, which spares the start of another."""
    return partial(decode_image, max_pixels=config.reading.max_pixels)


def make_dataset(config: RunConfig, checkpoint: Path | str) -> Run:
    """A finished dataset, made without Ray, as by workers of one CPU."""
    model = load_model(str(checkpoint), image_size=config.model.image_size)
    made = runs.open_run(config, weights_of(model))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for shard in range(made.shards):
            make_shard(shard, config, content_of(config, model), decode_here(config), made.provenance)
    finally:
        torch.set_num_threads(threads)
    return made


def rows(dataset: Path | str, **filesystem: Any) -> list[dict[str, Any]]:
    """All rows of a masks dataset, by image_id."""
    table = pq.read_table(f"{dataset}/masks", **filesystem)
    return sorted(table.to_pylist(), key=lambda row: row["image_id"])
