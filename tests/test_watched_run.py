"""A run watched from outside, by its output alone, while it goes on and after."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from poisoned import poisoned, write_plugin
from running import TIMEOUT_S, call, command, rows, wait_for_ray_workers, write_jpegs
from runs_of_masks import job

pytestmark = pytest.mark.alone


def status_of(output: Path) -> dict[str, Any]:
    said = call("jobs.status", "--output", output, "--json")
    assert said.returncode == 0, said.stderr
    found: dict[str, Any] = json.loads(said.stdout)
    return found


def test_case_39_what_takes_its_decoder_down_is_a_row_and_its_worker_lives(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    """One image hangs and one crashes its decoder. The one worker that dies is killed from here."""
    folder = write_jpegs(tmp_path / "in", 5)
    slow = folder / "0003a.ppm"
    slow.write_bytes(poisoned("hangs"))
    (folder / "0004a.ppm").write_bytes(poisoned("segfaults"))
    output = tmp_path / "out"
    flags = ["--images-per-shard", "3", "--num-workers", "1", "--decode-timeout", "12"]
    # Which it has twice: it is looked for in a file that is written every ten seconds.
    own = {
        "PYTHONPATH": f"{write_plugin(tmp_path / 'plugin')}:{os.environ.get('PYTHONPATH', '')}",
        "RAY_enable_metrics_collection": "0",
    }
    with (tmp_path / "log").open("w") as log:
        driver = subprocess.Popen(
            command(*job(tiny_checkpoint, folder, output, *flags)), stderr=log, env=os.environ | own
        )
    try:
        watch(driver, output, slow, tmp_path / "log")
    finally:
        driver.kill()
        driver.wait()
    said = (tmp_path / "log").read_text()
    assert said.count("Ray exports no metrics here") == 1  # and the run goes on
    assert call("jobs.verify_masks", "--output", output).returncode == 0
    assert [row["status"] for row in rows(output)] == ["ok"] * 4 + ["timeout", "ok", "decoder_crash"]


def watch(driver: subprocess.Popen[bytes], output: Path, slow: Path, log: Path) -> None:
    """Kill its worker at the image that hangs, and see what its output says then and after."""
    wait_for_image(4, 1, driver, output, log)
    [worker] = wait_for_ray_workers(driver, "ShardWorker", 1)
    os.kill(worker.pid, signal.SIGKILL)

    found = wait_for_image(4, 2, driver, output, log)
    [seen] = found["progress"]["in_work"]
    assert found["state"] == "running"
    assert (seen["shard"], seen["images"], seen["of"]) == (1, 1, 3)
    assert seen["image"]["uri"] == slow.as_uri()
    assert 0 < seen["image"]["seconds"] <= seen["seconds"]
    assert seen["silent_seconds"] < 15
    progress = found["progress"]
    assert (progress["workers"], progress["workers_died"]) == (1, 1)
    done = progress["shards_done"]  # the others, of three images and of one, come before it or after it
    assert done <= found["shards_with_file"] <= 2
    assert (done, progress["images_done"] - 1) in {(0, 0), (1, 3), (1, 1), (2, 4)}

    assert driver.wait(TIMEOUT_S) == 0, log.read_text()
    found = status_of(output)
    progress = found["progress"]
    assert found["state"] == progress["state"] == "complete"
    assert (progress["images_done"], progress["in_work"], progress["workers_died"]) == (7, [], 1)
    assert progress["failures"] == {"timeout": 1, "decoder_crash": 1}
    slowest = progress["slowest_images"][0]
    assert (slowest["image_id"], slowest["uri"], slowest["status"]) == (4, slow.as_uri(), "timeout")
    assert slowest["seconds"] > 12  # twice that, less what it was decoded ahead
    assert {image["image_id"] for image in progress["slowest_images"]} == set(range(7))
    assert progress["slowest_shards"][0]["shard"] == 1
    assert found["findings"][0].startswith("Workers died while they made a shard, 1 in all")
    assert f"run {found['run_id']}: 7 images in 3 shards, 3 to do" in log.read_text()


def wait_for_image(
    image: int, attempt: int, driver: subprocess.Popen[bytes], output: Path, log: Path
) -> dict[str, Any]:
    """The status, once its file says that a worker is at this image, in such an attempt at its shard."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        assert driver.poll() is None, log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.2)
        if not (output / "progress.json").exists():
            continue
        found = status_of(output)
        [seen] = found["progress"]["in_work"] or [{}]
        if seen and seen["attempt"] == attempt and (seen["image"] or {}).get("image_id") == image:
            return found
