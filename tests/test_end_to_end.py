"""The main job as a user runs it on local disk: taken up again, refused, killed, interrupted."""

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from running import call, command, jpeg, processes_with, rows, run, write_jpegs
from runs_of_masks import job, summary_of, wait_for_shards

import pipeline

pytestmark = pytest.mark.alone

LOOPBACK = {"0100007F", "0" * 24 + "01000000", "0" * 16 + "FFFF0000" + "0100007F"}
"""Its addresses of IPv4 and IPv6, as the kernel writes them."""

DETERMINANTS: dict[str, Any] = {
    "images_per_shard": 3,
    "precision": "fp32",
    "image_size": 64,
    "reading": {"max_pixels": 200_000_000, "max_bytes": 2**29},
    "code": pipeline.__version__,
    "schema": {"manifest": 1, "masks": 1},
    "amg": {
        "points_per_side": 2,
        "pred_iou_thresh": -10,
        "stability_score_thresh": 0,
        "stability_score_offset": 1,
        "box_nms_thresh": 1,
        "crop_n_layers": 0,
        "crop_nms_thresh": 0.7,
        "crop_overlap_ratio": 512 / 1500,
        "crop_n_points_downscale_factor": 1,
        "point_grids": None,
        "min_mask_region_area": 0,
        "output_mode": "coco_rle",
    },
}
"""What the footer of a shard says of the first run below, but for its images and its weights."""


def test_a_local_run_is_estimated_made_and_verified(
    tmp_path: Path, tiny_checkpoint: Path, cluster: dict[str, str]
) -> None:
    folder = write_jpegs(tmp_path / "in", 5)
    (folder / "sub").mkdir()
    (folder / "sub" / "0000.jpg").write_bytes(jpeg(9))
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (folder / "notes.txt").write_text("not an image")
    output = tmp_path / "out"
    dry = run(*job(tiny_checkpoint, folder, output, "--images-per-shard", "3", "--dry-run"), **cluster)
    assert dry.returncode == 0, dry.stderr
    estimated = json.loads(dry.stdout)
    assert (estimated["images"], estimated["sampled"], estimated["workers"]) == (7, 7, 1)
    assert min(estimated["seconds"], estimated["output_bytes"]) > 0
    assert not output.exists()
    first = run(*job(tiny_checkpoint, folder, output, "--images-per-shard", "3", "--max-bytes", "512MiB"))
    assert first.returncode == 0, first.stderr
    document = json.loads((output / "run.json").read_text())
    for path in (output / "masks").iterdir():
        footer = json.loads(pq.read_metadata(path).metadata[b"everymask"])
        assert footer["fingerprint"] == document["fingerprint"]
        assert (
            footer["determinants"]
            == document["determinants"]
            == DETERMINANTS
            | {
                "images": f"file://{folder}",
                "weights_sha256": hashlib.sha256(tiny_checkpoint.read_bytes()).hexdigest(),
            }
        )
    found = rows(output)
    assert [row["image_id"] for row in found] == list(range(7))
    assert sum(row["status"] == "ok" for row in found) == 6
    summary = summary_of(output)
    assert (summary["state"], summary["ok"], summary["failed"]) == ("complete", 6, 1)
    assert summary["failures"] == {"truncated": 1}
    assert summary["skipped"] == {".txt": 1}
    assert summary["masks"] == sum(len(row["masks"]) for row in found) == estimated["masks"]
    assert call("jobs.verify_masks", "--output", output).returncode == 0

    other = call(*job(tiny_checkpoint, folder, output, "--images-per-shard", "4", "--max-bytes", "512MiB"))
    assert other.returncode == 2
    assert "images_per_shard" in other.stderr

    (output / "masks" / "part-00001.parquet").write_bytes(b"PAR1")
    damaged = call(*job(tiny_checkpoint, folder, output, "--images-per-shard", "3", "--max-bytes", "512MiB"))
    assert damaged.returncode == 1
    assert "7 images in 3 shards, 0 to do" in damaged.stderr
    assert (
        f"are damaged: 1. `python -m jobs.verify_masks --output file://{output} --remove-damaged`"
        in damaged.stderr
    )
    assert summary_of(output)["damaged_shards"] == [1]


def test_case_41_too_many_failures_stop_the_run(
    tmp_path: Path, tiny_checkpoint: Path, cluster: dict[str, str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for index in range(150):
        (folder / f"{index:03d}.jpg").write_bytes(b"no image" if index % 4 else jpeg(index))
    output = tmp_path / "out"
    flags = job(tiny_checkpoint, folder, output, "--images-per-shard", "10", "--max-failure-rate", "0.3")
    stopped = run(*flags, **cluster)
    assert stopped.returncode == 4, stopped.stderr
    assert "--max-failure-rate" in stopped.stderr
    summary = summary_of(output)
    assert summary["state"] == "too_many_failures"
    assert summary["failed"] > 0
    assert summary["ok"] + summary["failed"] + summary["not_done"] == 150


def listening(session: str) -> set[str]:
    """The addresses, as the kernel writes them, at which the processes of a Ray listen."""
    sockets = set()
    for process in processes_with(session):
        with contextlib.suppress(OSError):  # it has ended
            for file in Path(f"/proc/{process.pid}/fd").iterdir():
                with contextlib.suppress(OSError):  # it is closed
                    sockets.add(str(file.readlink()))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                found.add(fields[1].split(":")[0])
    return found


@pytest.fixture
def _interrupts() -> Iterator[None]:
    """What a shell starts in the background ignores them, and so would its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interrupts")
def test_case_45_interrupt_keeps_finished_shards_and_its_ray_is_on_loopback(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    folder = write_jpegs(tmp_path / "in", 300)
    output = tmp_path / "out"
    process = subprocess.Popen(
        command(*job(tiny_checkpoint, folder, output, "--images-per-shard", "2")),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={name: value for name, value in os.environ.items() if name != "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"},
    )
    try:
        wait_for_shards(output, 3, process)
        commands = "\n".join(one.command for one in processes_with(f"_{process.pid}"))
        [session] = set(re.findall(rf"session_[\d_-]+_{process.pid}\b", commands))
        assert LOOPBACK >= listening(session) != set()
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    summary = summary_of(output)
    assert summary["state"] == "interrupted"
    finished = list((output / "masks").glob("part-*.parquet"))
    assert 3 <= len(finished) < 150
    assert summary["ok"] == 2 * len(finished)
    assert summary["not_done"] == 300 - summary["ok"]
    assert processes_with(session) == []
