"""A worker that is told to go: SIGTERM to its process, as on a spot machine that is taken back."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from running import TIMEOUT_S, rows, wait_for_ray_workers, write_jpegs
from runs_of_masks import job

NOTICED = """
import signal, sys, threading, time
from pipeline.preemption import Notice

signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
notice = Notice(float(sys.argv[1]))

def work():
    with notice.working():
        print("working", flush=True)
        try:
            while True:
                time.sleep(0.05)
                if sys.argv[2] == "heeds":
                    notice.check()
        except SystemExit:
            time.sleep(0.5)
            print("let go", flush=True)
            raise

threading.Thread(target=work, daemon=True).start()
while True:
    time.sleep(1)
"""


@pytest.mark.parametrize(("seconds", "work", "said"), [(30, "heeds", "let go\n"), (0.5, "is deaf", "")])
def test_the_process_ends_once_its_work_has_let_go(seconds: float, work: str, said: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", NOTICED, str(seconds), work],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stdout.readline() == "working\n"
    process.terminate()
    output, errors = process.communicate(timeout=20)
    assert (process.returncode, output, errors) == (7, said, "")


def test_without_another_handler_the_signal_has_its_way() -> None:
    script = (
        "import signal; from pipeline.preemption import Notice; Notice(1); signal.raise_signal(signal.SIGTERM)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGTERM


WATCHED = """
import json, os, sys

from jobs.command import run_command
from jobs.generate_masks import generate_masks
from pipeline import engine


class WatchedBoard(engine.Board):
    def begin(self, shard, worker):
        attempt = super().begin(shard, worker)
        with open(os.environ["BEGUN"], "a") as file:
            print(json.dumps([shard, attempt]), file=file)
        return attempt


engine.Board = WatchedBoard
run_command(generate_masks, "jobs.generate_masks", sys.argv[1:])
"""


@pytest.mark.alone
def test_a_worker_that_is_told_to_go_drops_its_shard_and_another_makes_it(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    images = write_jpegs(tmp_path / "in", 60)
    output, begun = tmp_path / "out", tmp_path / "begun"
    flags = [*job(tiny_checkpoint, images, output, "--images-per-shard", "30"), "--num-workers", "1"][1:]
    driver = subprocess.Popen(
        [sys.executable, "-c", WATCHED, *map(str, flags)],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"BEGUN": str(begun), "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        while not begun.exists():
            assert driver.poll() is None
            time.sleep(0.05)
        [worker] = wait_for_ray_workers(driver, "ray::MapWorker", 1)
        os.kill(worker.pid, signal.SIGTERM)
        _, log = driver.communicate(timeout=TIMEOUT_S)
    finally:
        driver.kill()
        driver.wait()
    assert driver.returncode == 0, log
    attempts = [json.loads(line) for line in begun.read_text().splitlines()]
    assert attempts.count(attempts[0]) == 2, attempts
    assert {attempt for _, attempt in attempts} == {1}, "a shard is blamed for what it did not do"
    assert [row["status"] for row in rows(output)] == ["ok"] * 60
