"""progress.json: what it says of what it was told, and that it stops no run."""

import json
import logging
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from pipeline import progress_file
from pipeline.board import AtWork, Post, Work
from pipeline.config import MasksConfig
from pipeline.plan import Counts, Plan
from pipeline.progress_file import ProgressFile
from pipeline.reconcile import ToDo
from pipeline.run import Run
from pipeline.shard import ShardSummary
from schemas.progress import Progress

_PROGRESS = TypeAdapter(Progress)


def run_in(output: Path) -> Run:
    """Of 95 images in 10 shards."""
    config = MasksConfig(images="file:///in", output=output.as_uri())
    return Run(config, "0123456789abcdef" * 4, {"images_per_shard": 10}, Plan(Counts(95, 10)))


def told_of(run: Run, shards: list[int]) -> ProgressFile:
    return ProgressFile(run, ToDo(run, run.plan.counts, shards))


def at_work(shard: int, images: int, at_hand: float | None = None, silent: float = 0.5) -> AtWork:
    image = {"image_id": 10 * shard + images, "uri": "s3://b/x.jpg", "seconds": at_hand}
    post = Post(
        f"worker {shard}", shard, images, 3 * images, {"timeout": 1}, None if at_hand is None else image, []
    )  # type: ignore[arg-type]
    return AtWork(2, 8.04, silent, post, None)


def written(output: Path) -> Progress:
    return _PROGRESS.validate_python(json.loads((output / "progress.json").read_text()))


def test_it_says_what_is_done_and_what_is_in_work(tmp_path: Path) -> None:
    told = told_of(run_in(tmp_path), [5, 6, 7, 8, 9])
    time.sleep(0.05)
    told.finished(ShardSummary(5, 10, 40, {"ok": 8, "truncated": 2}, 9, 20.0))
    told.finished(ShardSummary(6, 10, 50, {"ok": 10}, 9, 30.0))
    told.show(Work((at_work(7, 4, 6.0), at_work(9, 2, 7.0), at_work(8, 1, None, silent=100)), 3))
    document = _PROGRESS.validate_python(told.document("running"))
    assert (document["run_id"], document["fingerprint"]) == ("0123456789ab", "0123456789abcdef" * 4)
    assert (document["images"], document["images_before"], document["images_done"]) == (95, 50, 27)
    assert (document["failed"], document["failures"]) == (5, {"timeout": 3, "truncated": 2})
    assert document["masks"] == 40 + 50 + 3 * 7
    assert (document["shards"], document["shards_before"], document["shards_done"]) == (10, 5, 2)
    assert (document["workers"], document["workers_died"], document["shards_in_work"]) == (2, 3, 3)
    assert [(one["shard"], one["images"], one["of"]) for one in document["in_work"]] == [
        (9, 2, 5),
        (7, 4, 10),
        (8, 1, 10),
    ]
    assert document["seconds_per_image"] == pytest.approx((50 + 3 * 8.04 - 13) / 27, abs=1e-6)
    assert document["slowest_shards"][0] == {"shard": 6, "seconds": 30.0, "images": 10}
    rate = document["images_per_second_recent"]
    assert document["images_per_second"] == rate == pytest.approx(27 / document["seconds"], rel=0.01)
    assert document["seconds_left"] == pytest.approx((95 - 50 - 27) / rate, abs=0.06)


def test_at_the_end_nothing_is_in_work(tmp_path: Path) -> None:
    with told_of(run_in(tmp_path), [7, 8, 9]) as told:
        told.show(Work((at_work(7, 4, 6.0),), 1))
        told.finished(ShardSummary(8, 10, 40, {"ok": 10}, 9, 20.0))
        told.end("interrupted")
    document = written(tmp_path)
    assert (document["state"], document["images_done"], document["failed"]) == ("interrupted", 10, 0)
    assert (document["in_work"], document["workers"], document["workers_died"]) == ([], 0, 1)


def test_the_recent_rate_is_that_of_the_last_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_file, "_RECENT_S", 0.2)
    told = told_of(run_in(tmp_path), list(range(10)))
    for shard in range(5):
        told.finished(ShardSummary(shard, 10, 10, {"ok": 10}, 9, 1.0))
    assert told.document("running")["images_per_second_recent"] > 0
    time.sleep(0.25)
    told.document("running")
    time.sleep(0.25)
    slower = told.document("running")
    assert slower["images_per_second"] > 0
    assert slower["images_per_second_recent"] == 0
    assert slower["seconds_left"] == pytest.approx(45 / slower["images_per_second"], abs=0.06)
    told.show(Work((at_work(6, 4),)))
    told.document("running")
    told.show(Work((replace(at_work(6, 0)),)))  # begun again
    assert told.document("running")["images_per_second_recent"] >= 0


def test_it_is_written_at_once_again_and_again_and_no_more_after_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress_file, "SECONDS_BETWEEN_WRITES", 0.05)
    path = tmp_path / "progress.json"
    with told_of(run_in(tmp_path), [9]) as told:
        seen: set[int] = set()
        deadline = time.monotonic() + 30
        while len(seen) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
            if path.exists():
                seen.add(path.stat().st_ino)  # each is a file of its own, put in place of the one before
        assert len(seen) >= 2
        assert written(tmp_path)["state"] == "running"
        told.end("complete")
    before = path.stat()
    time.sleep(0.2)
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert written(tmp_path)["state"] == "complete"
    assert "progress.json" not in {thread.name for thread in threading.enumerate()}


def test_where_it_cannot_be_written_the_log_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress_file, "SECONDS_BETWEEN_WRITES", 0.02)
    (tmp_path / "progress.json").mkdir()
    with caplog.at_level(logging.WARNING), told_of(run_in(tmp_path), [9]) as told:
        time.sleep(0.2)
        told.end("complete")
    [message] = caplog.messages
    assert "progress.json is not written, and the run goes on" in message


def test_no_more_than_a_hundred_shards_are_listed(tmp_path: Path) -> None:
    run: Any = replace(run_in(tmp_path), plan=Plan(Counts(2000, 200)))
    told = told_of(run, list(range(200)))
    failed = tuple({"shard": shard, "error": "no space left"} for shard in range(150))
    told.show(Work(tuple(at_work(shard, 1, 1.0) for shard in range(150)), 0, failed))  # type: ignore[arg-type]
    document = told.document("running")
    assert (document["shards_in_work"], len(document["in_work"])) == (150, 100)
    assert (document["shards_failed"], len(document["failed_shards"])) == (150, 100)
