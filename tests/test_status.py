"""jobs.status on outputs as runs leave them, without a Ray."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from running import call

from pipeline.status import findings, read_status
from schemas import progress as progress_schema
from schemas import summary as summary_schema

FINGERPRINT = "0123456789abcdef" * 4


def progress(ago: float = 2.0, **changed: Any) -> dict[str, Any]:
    """Of a run that goes well, written so many seconds ago."""
    now = datetime.now(UTC)
    document = {
        "schema_version": progress_schema.SCHEMA_VERSION,
        "run_id": FINGERPRINT[:12],
        "fingerprint": FINGERPRINT,
        "state": "running",
        "started": (now - timedelta(seconds=300)).isoformat(timespec="seconds"),
        "updated": (now - timedelta(seconds=ago)).isoformat(timespec="seconds"),
        "seconds": 300.0,
        "images": 1000,
        "listed": True,
        "images_before": 200,
        "images_done": 350,
        "failed": 7,
        "failures": {"truncated": 5, "timeout": 2},
        "masks": 12345,
        "images_per_second": 1.167,
        "images_per_second_recent": 1.5,
        "masks_per_second": 41.2,
        "masks_per_second_recent": 50.0,
        "seconds_left": 300.0,
        "seconds_per_image": 1.25,
        "shards": 10,
        "shards_before": 2,
        "shards_done": 3,
        "workers": 2,
        "workers_died": 0,
        "shards_in_work": 1,
        "in_work": [in_work()],
        "shards_failed": 0,
        "failed_shards": [],
        "slowest_images": [
            {"image_id": 17, "uri": f"s3://bucket/{'deep/' * 20}17.jpg", "seconds": 12.5, "status": "ok"}
        ],
        "slowest_shards": [{"shard": 3, "seconds": 130.2, "images": 100}],
    }
    return document | changed


def in_work(**changed: Any) -> dict[str, Any]:
    image = {"image_id": 642, "uri": "s3://bucket/photos/642.jpg", "seconds": 1.5}
    return {
        "shard": 6,
        "attempt": 1,
        "seconds": 63.0,
        "silent_seconds": 0.4,
        "images": 42,
        "of": 100,
        "masks": 400,
        "failed": 0,
        "image": image,
        "died_at": None,
    } | changed


def image_at_hand(seconds: float) -> dict[str, Any]:
    return {"image_id": 642, "uri": "s3://bucket/photos/642.jpg", "seconds": seconds}


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A run of 10 shards, of which 5 have a file; no command that made it has left a word."""
    counts = {"images": 1000, "shards": 10, "duplicates": 0, "skipped": {}, "digest": "d"}
    determinants = {"schema": {"manifest": 1, "masks": 1}}
    (tmp_path / "masks").mkdir()
    for shard in range(5):
        (tmp_path / "masks" / f"part-{shard:05d}.parquet").touch()
    write(tmp_path / "run.json", {"fingerprint": FINGERPRINT, "determinants": determinants, "manifest": counts})
    return tmp_path


def write(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document))


def summary(state: str) -> dict[str, Any]:
    version = summary_schema.SCHEMA_VERSION
    return {"schema_version": version, "state": state, "images": 1000, "not_done": 500, "failed": 9}


def findings_of(output: Path, document: dict[str, Any]) -> list[str]:
    write(output / "progress.json", document)
    return findings(read_status(output.as_uri()))


def test_a_running_run_as_text(output: Path) -> None:
    write(output / "progress.json", progress())
    done = call("jobs.status", "--output", output)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "masks, run 0123456789ab: running"
    for line in (
        "images      550 of 1,000 (55.0%), 200 of them before; 7 failed",
        "failures    5 truncated, 2 timeout",
        "shards      5 of 10 (50.0%), 1 in work",
        "now         1.50 images/s, 50.0 masks/s",
        "on average  1.17 images/s, 41.2 masks/s",
        "time left   about 5 min",
        "workers     2 at work, 0 died",
        "shard  attempt  images   for  image  at hand  uri",
        "    6        1  42/100  63 s    642      2 s  s3://bucket/photos/642.jpg",
        "    3    130.2     100",
    ):
        assert line in lines, done.stdout
    assert lines[2 + lines.index("Slowest images")].startswith("   17    12.50  ok      ...")
    assert lines[2 + lines.index("Slowest images")].endswith("/17.jpg")
    assert max(len(line) for line in lines if not line.startswith("file://")) <= 80
    assert "! " not in done.stdout


def test_a_run_whose_images_are_still_listed(output: Path) -> None:
    (output / "run.json").rename(output / "plan.json")
    write(output / "progress.json", progress(listed=False, seconds_left=None))
    done = call("jobs.status", "--output", output)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "images      550 of 1,000 (55.0%), as far as they are listed, 200 of them before; 7 failed" in lines
    assert "time left   unknown" in lines


def test_a_running_run_as_json(output: Path) -> None:
    document = progress()
    write(output / "progress.json", document)
    write(output / "summary.json", summary("interrupted"))
    done = call("jobs.status", "--output", output, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["output"], found["run_id"], found["kind"]) == (output.as_uri(), FINGERPRINT[:12], "masks")
    assert (found["state"], found["shards_with_file"], found["findings"]) == ("running", 5, [])
    assert 1 <= found["silent_seconds"] < 60
    assert found["progress"] == document
    assert found["summary"]["state"] == "interrupted"


def test_a_run_is_watched_to_its_end(output: Path) -> None:
    write(output / "progress.json", progress(state="complete", in_work=[], shards_in_work=0))
    done = call("jobs.status", "--output", output, "--json", "--watch", "1")
    assert done.returncode == 0, done.stderr
    [line] = done.stdout.splitlines()
    assert json.loads(line)["state"] == "complete"


def test_an_image_that_takes_far_longer_than_others_is_named(output: Path) -> None:
    stuck = progress(in_work=[in_work(image=image_at_hand(31))])
    [found] = findings_of(output, stuck)
    assert found.startswith("Image 642 of shard 6 has been at hand for 31 s; others take 1.25 s: s3://bucket/")
    assert findings_of(output, progress(in_work=[in_work(image=image_at_hand(29))])) == []
    usual = progress(seconds_per_image=4.0, in_work=[in_work(image=image_at_hand(31))])
    assert findings_of(output, usual) == []


def test_a_shard_that_is_attempted_again_and_again_is_named(output: Path) -> None:
    again = progress(workers_died=2, in_work=[in_work(attempt=3, died_at=image_at_hand(2))])
    first, second = findings_of(output, again)
    assert first.startswith("Shard 6 is in its attempt 3, as its workers died. The last died at image 642")
    assert second.startswith("Workers died while they made a shard, 2 in all")
    [once] = findings_of(output, progress(workers_died=1, in_work=[in_work(attempt=2)]))
    page = (Path(__file__).parent.parent / "docs" / "operations.md").read_text()
    assert f"\n! {once.partition('. ')[0]}.\n" in page


def test_workers_that_are_silent_or_missing_are_named(output: Path) -> None:
    [silent] = findings_of(output, progress(in_work=[in_work(silent_seconds=70)]))
    assert silent.startswith("The worker of shard 6 has not been heard of for 70 s.")
    [none] = findings_of(output, progress(workers=0, in_work=[], shards_in_work=0))
    assert none.startswith("No worker makes a shard")
    assert findings_of(output, progress(workers=0, in_work=[], shards_in_work=0, seconds=60.0)) == []
    assert findings_of(output, progress(workers=None, in_work=[], shards_in_work=0)) == []  # a curation


def test_shards_that_failed_are_named_after_the_end_too(output: Path) -> None:
    failed = [{"shard": shard, "error": "OSError: no space left"} for shard in range(7)]
    ended = progress(state="incomplete", in_work=[], shards_failed=7, failed_shards=failed)
    found = findings_of(output, ended)
    assert found[0].startswith("Shard 0 failed: OSError: no space left")
    assert found[5:] == ["2 more shards failed."]


def test_a_driver_that_is_silent_may_be_dead(output: Path) -> None:
    [found] = findings_of(output, progress(ago=75))
    assert found.startswith("The driver has not written for 7")
    assert "it may be dead. The same command goes on." in found
    write(output / "summary.json", summary("complete"))
    assert read_status(output.as_uri()).state == "running"  # that summary is of another time: shards are missing
    for shard in range(10):
        (output / "masks" / f"part-{shard:05d}.parquet").touch()
    assert read_status(output.as_uri()).state == "complete"
    assert findings(read_status(output.as_uri())) == []


def test_an_output_without_progress_shows_what_there_is(output: Path) -> None:
    done = call("jobs.status", "--output", output)
    assert done.returncode == 0, done.stderr
    assert "no word of its end" in done.stdout
    assert "shards      5 of 10 (50.0%)" in done.stdout
    assert "There is no progress.json of this run" in done.stdout
    write(output / "summary.json", summary("incomplete"))
    write(output / "progress.json", progress(fingerprint="f" * 64))  # of another run
    done = call("jobs.status", "--output", output)
    assert "run 0123456789ab: incomplete" in done.stdout
    assert "images      500 of 1,000 (50.0%); 9 failed, by summary.json" in done.stdout
    assert "There is no progress.json of this run" in done.stdout


def test_an_output_without_a_run_is_refused(tmp_path: Path) -> None:
    done = call("jobs.status", "--output", tmp_path)
    assert done.returncode == 2
    assert "holds no run" in done.stderr


@pytest.mark.parametrize("name", ["progress.json", "summary.json"])
def test_a_newer_schema_is_refused_and_both_versions_named(output: Path, name: str) -> None:
    own = {"progress.json": progress_schema, "summary.json": summary_schema}[name].SCHEMA_VERSION
    write(output / name, progress(schema_version=own + 1))
    done = call("jobs.status", "--output", output)
    assert done.returncode == 2
    assert f"{name} has version {own + 1} of its schema" in done.stderr
    assert f"up to version {own}." in done.stderr


def test_a_damaged_summary_is_refused(output: Path) -> None:
    write(output / "summary.json", {"schema_version": 1, "state": "complete"})
    done = call("jobs.status", "--output", output)
    assert done.returncode == 2, done.stdout
    assert "summary.json is damaged" in done.stderr
    assert "not_done" in done.stderr


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        json.dumps(progress(seconds="long")),
        json.dumps(progress(updated="yesterday")),
        json.dumps(progress(updated="2026-01-01T00:00:00")),
        json.dumps({key: value for key, value in progress().items() if key != "in_work"}),
    ],
)
def test_a_damaged_progress_is_refused(output: Path, text: str) -> None:
    (output / "progress.json").write_text(text)
    done = call("jobs.status", "--output", output)
    assert done.returncode == 2, done.stdout
    assert "progress.json is damaged" in done.stderr
