"""Shards are made while images are listed: what is final, what becomes of a listing that is cut short."""

import json
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq
import pytest
import simulated_store  # noqa: F401 (registers the store)

from jobs import dataset
from pipeline import documents, manifest, reconcile, storage
from pipeline import plan as plans
from pipeline import run as runs
from pipeline.config import AmgConfig, LoadedWeights, MasksConfig
from pipeline.errors import IncompleteRun, NoImages, OutputConflict, StorageError
from pipeline.plan import Counts, Plan, Stopped
from pipeline.progress_file import ProgressFile
from pipeline.reconcile import ToDo
from pipeline.run import Run
from pipeline.shard import ShardSummary
from pipeline.sources import ImageRef
from pipeline.status import read_status

WEIGHTS = LoadedWeights("0" * 64, 64, "mobile_sam", {})
ROOT = "simulated://bucket/in"
PART = manifest.SHARDS_PER_PART  # images too, at one a shard


def image(index: int, name: str = "") -> ImageRef:
    return ImageRef(f"{ROOT}/{index:06d}{name}.jpg", 1, None, None, None)


def settings(tmp_path: Path, **changes: Any) -> MasksConfig:
    fields: dict[str, Any] = {"images": ROOT, "output": tmp_path.as_uri(), "images_per_shard": 1}
    return MasksConfig(**fields | changes)


class Listing:
    """Gives images, and waits where it is told to before the next one; None stands for a failure."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, images: "list[ImageRef | None]", wait_at: int = -1
    ) -> None:
        self.goes_on = threading.Event()
        self.ended = threading.Event()
        self._images, self._wait_at = images, wait_at
        monkeypatch.setattr(runs.sources, "find_images", self._find)

    def _find(self, _address: str, skipped: dict[str, int]) -> Iterator[ImageRef]:
        try:
            for index, found in enumerate(self._images):
                if index == self._wait_at:
                    skipped[".txt"] = 3
                    assert self.goes_on.wait(60)
                if found is None:
                    raise StorageError("the bucket is gone")
                yield found
        finally:
            self.ended.set()


def rows_of(output: str) -> list[tuple[int, str]]:
    """Number and URI of every row of the manifest's parts that are there."""
    paths = sorted(Path(output.removeprefix("file://"), "manifest").glob("part-*.parquet"))
    tables = [pq.read_table(path, columns=["image_id", "uri"]).to_pylist() for path in paths]
    return [(row["image_id"], row["uri"]) for table in tables for row in table]


def rest_of(batches: Iterator[list[int]]) -> list[int]:
    return [shard for batch in batches for shard in batch]


def test_the_first_shards_are_there_before_the_listing_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [image(index) for index in range(3 * PART + 10)]
    listing = Listing(monkeypatch, list(images), wait_at=2 * PART + 5)
    config = settings(tmp_path)
    run = runs.open_run(config, WEIGHTS)
    while run.shards < 2 * PART:
        assert run.plan.wait(run.shards, 60)
    assert (run.images, run.plan.ended, listing.ended.is_set()) == (2 * PART, False, False)
    assert rows_of(config.output) == [(index, ref.uri) for index, ref in enumerate(images[: 2 * PART])]
    with pytest.raises(OutputConflict, match="still being listed"):
        documents.read_document(config.output)
    to_do = reconcile.to_do(run)
    batches = to_do.batches(PART)
    assert [next(batches), next(batches), next(batches)] == [[*range(PART)], [*range(PART, 2 * PART)], []]
    status = read_status(config.output)
    assert (status.run_id, status.shards, status.shards_done) == (run.run_id, 2 * PART, 0)

    listing.goes_on.set()
    assert rest_of(batches) == list(range(2 * PART, 3 * PART + 10))
    assert run.plan.ended
    assert run.plan.counts == Counts(3 * PART + 10, 3 * PART + 10, 0, {".txt": 3})
    document = documents.read_document(config.output)
    assert not (tmp_path / "plan.json").exists()
    assert document["manifest"]["digest"] == manifest.digest_of(config.output, run.shards)
    whole = manifest.write_manifest(images, str(tmp_path / "whole"), images_per_shard=1)
    assert document["manifest"]["digest"] == whole.digest
    for path in (tmp_path / "whole" / "manifest").iterdir():
        assert (tmp_path / "manifest" / path.name).read_bytes() == path.read_bytes()


def test_a_listing_cut_short_goes_on_and_numbers_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Listing(monkeypatch, [*(image(index) for index in range(PART + 20)), None])
    config = settings(tmp_path)
    run = runs.open_run(config, WEIGHTS)
    batches = reconcile.to_do(run).batches(1000)
    assert next(batches) == list(range(PART))
    with pytest.raises(IncompleteRun, match=r"could be listed: the bucket is gone"):
        rest_of(batches)
    assert json.loads((tmp_path / "plan.json").read_text())["manifest"]["shards"] == PART
    (tmp_path / "masks").mkdir()
    for shard in (0, 7):
        (tmp_path / "masks" / f"part-{shard:05d}.parquet").touch()

    # Meanwhile one is gone, one is new before what was numbered, and one is listed twice.
    images = [image(index) for index in range(2 * PART + 30) if index != 3]
    images.insert(1, image(0, " new"))
    listing = Listing(monkeypatch, [*images, image(PART + 1)], wait_at=0)
    again = runs.open_run(config, WEIGHTS)
    to_do = reconcile.to_do(again)
    assert (to_do.shards_before, to_do.images_before) == (2, 2)
    batches = to_do.batches(1000)
    assert next(batches) == [shard for shard in range(PART) if shard not in (0, 7)]  # before anything is listed
    listing.goes_on.set()
    assert rest_of(batches) == list(range(PART, 2 * PART + 31))
    rows = rows_of(config.output)
    assert rows[:PART] == [(index, image(index).uri) for index in range(PART)]
    left = [image(0, " new"), *(image(index) for index in range(PART, 2 * PART + 30))]
    assert rows[PART:] == [(number, ref.uri) for number, ref in enumerate(left, PART)]
    assert again.plan.counts.duplicates == 1
    document = documents.read_document(config.output)
    assert document["manifest"]["digest"] == manifest.digest_of(config.output, again.shards)


def test_a_listing_that_is_not_in_order_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    indices = [*range(100, 100 + PART), *range(100), *range(1000, 1000 + PART)]
    Listing(monkeypatch, [image(index) for index in indices])
    run = runs.open_run(settings(tmp_path), WEIGHTS)
    assert len(rest_of(reconcile.to_do(run).batches(1000))) == len(indices)
    numbered = [*range(100, 100 + PART), *range(100), *range(1000, 1000 + PART)]
    assert rows_of(run.config.output) == [(at, image(index).uri) for at, index in enumerate(numbered)]


@pytest.mark.parametrize("count", [0, 1, PART - 1, PART])
def test_small_listings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    Listing(monkeypatch, [image(index) for index in range(count)])
    run = runs.open_run(settings(tmp_path, allow_empty=True), WEIGHTS)
    assert rest_of(reconcile.to_do(run).batches(1000)) == list(range(count))
    assert (
        documents.read_document(run.config.output)["manifest"]["images"]
        == count
        == len(rows_of(tmp_path.as_uri()))
    )
    assert len(list((tmp_path / "manifest").iterdir())) == 1


def test_what_fails_before_the_first_shard_is_raised_and_nothing_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Listing(monkeypatch, [image(0), None])
    with pytest.raises(StorageError, match="the bucket is gone"):
        runs.open_run(settings(tmp_path), WEIGHTS)
    Listing(monkeypatch, [])
    with pytest.raises(NoImages):
        runs.open_run(settings(tmp_path), WEIGHTS)
    assert list(tmp_path.iterdir()) == []


def cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of which one part is numbered."""
    Listing(monkeypatch, [*(image(index) for index in range(PART)), None])
    run = runs.open_run(settings(tmp_path), WEIGHTS)
    with pytest.raises(IncompleteRun):
        rest_of(reconcile.to_do(run).batches(1000))


def test_another_run_is_refused_and_overwrite_lists_all_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_short(tmp_path, monkeypatch)
    other = {"amg": AmgConfig(points_per_side=2)}
    with pytest.raises(OutputConflict, match=r"amg\.points_per_side"):
        runs.open_run(settings(tmp_path, **other), WEIGHTS)
    with pytest.raises(StorageError, match="the bucket is gone"):
        runs.open_run(settings(tmp_path, overwrite=True, **other), WEIGHTS)
    assert (tmp_path / "plan.json").exists()
    Listing(monkeypatch, [image(0)])
    assert runs.open_run(settings(tmp_path, overwrite=True, **other), WEIGHTS).plan.ended
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest", "run.json"]


def test_a_check_is_told_of_all_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Listing(monkeypatch, [image(index) for index in range(PART + 1)])
    told: list[int] = []
    runs.open_run(settings(tmp_path), WEIGHTS, lambda run: told.append(run.images))
    assert told == [PART + 1]


def test_a_run_that_is_left_lists_no_more_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "_STOP_SECONDS", 0.1)
    listing = Listing(monkeypatch, [image(index) for index in range(PART + 10)], wait_at=PART + 5)

    def interrupted(_run: Run, to_do: ToDo, _told: ProgressFile) -> Iterator[ShardSummary]:
        assert len(next(to_do.batches(1000))) == PART
        raise KeyboardInterrupt
        yield

    run = runs.open_run(settings(tmp_path), WEIGHTS)
    with pytest.raises(KeyboardInterrupt):
        dataset.finish(run, interrupted, nullcontext)
    listing.goes_on.set()
    assert listing.ended.wait(60)
    assert not run.plan.ended
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["listed"], summary["images"], summary["state"]) == (False, PART, "interrupted")
    assert json.loads((tmp_path / "progress.json").read_text())["listed"] is False


def test_a_stopped_plan_takes_no_more() -> None:
    plan = Plan(Counts(), ended=False)
    items = plan.until_stopped(range(3))
    assert next(items) == 0
    plan.stop()
    with pytest.raises(Stopped):
        next(items)


def test_waiting() -> None:
    plan = Plan(Counts(), ended=False)
    assert not plan.wait(0, 0.01)
    plan.grow(Counts(10, 1))
    assert plan.wait(0, 60)
    assert not plan.wait(1, 0.01)
    plan.grow(Counts(20, 2), ended=True)
    assert plan.wait(2, 60)

    def fails(plan: Plan) -> None:
        plan.grow(Counts(10, 1))
        raise StorageError("no")

    failed = Plan(Counts(), ended=False)
    failed.begin(fails)
    assert failed.wait(0, 60)
    with pytest.raises(StorageError, match="no"):
        failed.wait(1, 60)


def test_progress_says_that_listing_goes_on(tmp_path: Path) -> None:
    plan = Plan(Counts(PART, PART), ended=False)
    run = Run(settings(tmp_path), "ab" * 32, {"images_per_shard": 1}, plan)
    told = ProgressFile(run, ToDo(run, plan.counts, list(range(PART))))
    told.finished(ShardSummary(0, 1, 5, {"ok": 1}, 9, 1.0))
    document = told.document("running")
    assert (document["images"], document["listed"], document["seconds_left"]) == (PART, False, None)
    plan.grow(replace(plan.counts, images=1000), ended=True)
    document = told.document("running")
    assert (document["images"], document["listed"]) == (1000, True)
    assert document["seconds_left"] is not None


def test_where_listings_are_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fsspec.config.conf, "simulated", {"keys": 10})
    assert storage.lists_in_order(ROOT)
    assert not storage.lists_in_order(f"{ROOT}/000000/000000000.jpg")
    assert not storage.lists_in_order(str(tmp_path))
    assert not storage.lists_in_order("s3://bucket--use1-az4--x-s3/in")
