"""A worker's events, without Ray: one line a phase and shard."""

import json
import logging
from datetime import datetime
from pathlib import Path

import pytest

from pipeline.events import EventLog, ShardEvents
from pipeline.outcomes import Reading
from pipeline.shard import ImageDone, ShardSummary

SUMMARY = ShardSummary(7, 2, 5, {"ok": 1, "truncated": 1}, 1234, 2.5)


def shard_of(log: EventLog) -> None:
    """Write the events of a shard of two images, and close the log."""
    events = ShardEvents(log, 7, 2)
    events.image_done(ImageDone(70, "s3://b/a.jpg", "ok", 5, {"fetch": 0.5, "encode": 1.0}, Reading(100, 0, 0, 0)))
    events.image_done(ImageDone(71, "s3://b/b.jpg", "truncated", 0, {"fetch": 1.5}, Reading(20, 0, 0, 0)))
    events.finished(SUMMARY, 0.25)
    log.close()


def test_a_shard_is_a_line_a_phase(tmp_path: Path) -> None:
    shard_of(EventLog(tmp_path, "run1", "worker1"))
    text = (tmp_path / "everymask-run1-worker1.log").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    times = [datetime.fromisoformat(line.pop("time")) for line in lines]
    assert all(time.tzinfo is not None for time in times)
    common = {"run": "run1", "worker": "worker1", "shard": 7, "attempt": 2}
    assert lines == [
        common | {"phase": "fetch", "images": 2, "seconds": 2.0, "slowest": 1.5, "bytes": 120},
        common | {"phase": "encode", "images": 1, "seconds": 1.0, "slowest": 1.0},
        common
        | {"phase": "write", "images": 2, "seconds": 0.25, "slowest": 0.25, "bytes": 1234, "masks": 5}
        | {"statuses": {"ok": 1, "truncated": 1}, "shard_seconds": 2.5},
    ]
    assert "s3://" not in text


def test_events_stay_out_of_the_log_that_people_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    shard_of(EventLog(tmp_path, "run1", "worker1"))
    assert not caplog.records


def test_where_no_file_can_be_written_the_shard_goes_on_and_it_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = EventLog(tmp_path / "not there", "run1", "worker1")
    shard_of(log)
    shard_of(log)
    [record] = caplog.records
    assert "No events are logged by this worker" in record.getMessage()
