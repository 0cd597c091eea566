"""A curated run: its documents and shards, what it refuses, and that verification knows it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from curated_masks import SIZE, STEPS, curated, make, masks_run, record
from known_masks import blobs, box
from running import call, rows, run

from pipeline import reconcile
from pipeline.curation.config import StepsConfig
from pipeline.curation.curate import curate_shard
from pipeline.errors import OutputConflict, SettingsError
from pipeline.run import Run
from pipeline.storage import canonical_uri
from pipeline.training.masks import MasksSource
from pipeline.verify import faults_of_shard
from schemas.masks import MASKS_SCHEMA

NUMBER_OF_IMAGES = 5


@pytest.fixture
def source(tmp_path: Path) -> Run:
    """Five images in three shards: masks, masks that a step drops, none, one that failed, masks."""
    ragged = [
        record(mask, iou) for mask, iou in zip(blobs(6, *SIZE), (0.9, 0.91, 0.92, 0.93, 0.94, 0.95), strict=True)
    ]
    small = [record(box(SIZE, 1, 1, 3, 3))]
    return masks_run(tmp_path, [ragged, small, [], None, ragged[2:]])


def test_a_curated_run_is_a_complete_run(source: Run) -> None:
    steps = STEPS.model_copy(update={"min_area": 10})
    run = curated(source, steps)
    output = make(run)
    assert run.fingerprint != source.fingerprint
    assert run.determinants["source"]["fingerprint"] == source.fingerprint
    assert run.determinants["curation"] == steps.model_dump()
    verified = call("jobs.verify_masks", "--output", output, "--processes", "1")
    assert (verified.returncode, verified.stdout) == (0, "")
    before, after = rows(source.config.output.removeprefix("file://")), rows(output)
    assert [row["status"] for row in after] == ["ok", "empty", "empty", "truncated", "ok"]
    assert [row["image_id"] for row in after] == list(range(NUMBER_OF_IMAGES))
    assert {name: after[3][name] for name in before[3]} == before[3]
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["images"], summary["ok"], summary["failed"], summary["state"]) == (5, 2, 1, "complete")
    assert summary["masks"] == sum(len(row["masks"]) for row in after)
    footer = json.loads(pq.read_metadata(output / "masks/part-00000.parquet").metadata[b"everymask"])
    assert footer["determinants"] == run.determinants


def test_a_training_reads_a_curated_run(source: Run) -> None:
    drawn = MasksSource(str(make(curated(source))))(np.random.default_rng(0))
    assert drawn.masks_NHW.sum(0).max() == 1  # a partition
    assert drawn.masks_NHW.any()


def test_a_curated_run_is_curated_again(source: Run) -> None:
    first = curated(source)
    make(first)
    again = curated(first, StepsConfig(min_area=60), output=first.config.output + "-again")
    assert again.determinants["source"]["fingerprint"] == first.fingerprint
    output = make(again)
    assert call("jobs.verify_masks", "--output", output, "--processes", "1").returncode == 0
    masks = [mask for row in rows(output) for mask in row["masks"]]
    assert masks
    assert {mask["parent_id"] for mask in masks} == {None}


def test_resume_makes_what_is_missing_and_other_settings_are_refused(source: Run) -> None:
    run = curated(source)
    output = make(run)
    shard = output / "masks/part-00001.parquet"
    shard.unlink()
    again = curated(source)
    assert (again.fingerprint, reconcile.shards_to_do(again)) == (run.fingerprint, [1])
    make(again)
    retried = curated(source, retry_failed=True)
    assert reconcile.shards_to_do(retried) == [1]  # which holds the image that failed
    with pytest.raises(OutputConflict, match=r"curation\.min_area \(0 there, 7 here\)"):
        curated(source, STEPS.model_copy(update={"min_area": 7}))
    anew = curated(source, STEPS.model_copy(update={"min_area": 7}), overwrite=True)
    assert reconcile.shards_to_do(anew) == [0, 1, 2]


def test_the_input_is_never_touched(source: Run, tmp_path: Path) -> None:
    for output in (source.config.output, source.config.output + "/curated", canonical_uri(str(tmp_path))):
        with pytest.raises(OutputConflict):
            curated(source, output=output, overwrite=True)
    other = masks_run(tmp_path / "other", [[]])
    with pytest.raises(OutputConflict, match="not made from another"):
        curated(source, output=other.config.output, overwrite=True)
    Path(source.config.output.removeprefix("file://"), "masks/part-00002.parquet").unlink()
    with pytest.raises(SettingsError, match="1 of 3 shards have no file, the first is 2"):
        curated(source)


def corrupt(output: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    """Change the first shard's rows and keep its footer."""
    path = output / "masks/part-00000.parquet"
    table = pq.read_table(path)
    changed = table.to_pylist()
    change(changed)
    schema = table.schema.with_metadata(pq.read_metadata(path).metadata)
    pq.write_table(pa.Table.from_pylist(changed, schema), path)


def test_verification_finds_what_only_a_curated_row_can_have_wrong(source: Run) -> None:
    run = curated(source, STEPS.model_copy(update={"hierarchy_thresh": 0.1}))
    output = make(run)

    def fault_after(change: Callable[[list[dict[str, Any]]], None]) -> str:
        corrupt(output, change)
        faults = faults_of_shard(run.config.output, "masks", run.fingerprint, 0)
        curate_shard(0, run.config, run.provenance)
        return "\n".join(faults)

    def set_(name: str, value: Any) -> Callable[[list[dict[str, Any]]], None]:
        return lambda rows: rows[0]["masks"][child].update({name: value})

    masks = rows(output)[0]["masks"]
    child = next(i for i, mask in enumerate(masks) if mask["parent_id"] is not None)
    assert f"mask {child}: parent 99 of" in fault_after(set_("parent_id", 99))
    assert f"mask {child}: depth 7 under" in fault_after(set_("depth", 7))
    assert f"mask {child}: depth {masks[child]['depth']} without a parent" in fault_after(set_("parent_id", None))
    assert "coverage 0.5," in fault_after(lambda rows: rows[0].update(coverage=0.5))
    whole = {**record(np.ones(SIZE, bool)), "parent_id": None, "depth": 0}
    everything = {"coverage": 1.0, "uncovered_area": 0}

    def overlapping(rows: list[dict[str, Any]]) -> None:
        root = next(i for i, mask in enumerate(rows[0]["masks"]) if mask["parent_id"] is None)
        rows[0]["masks"][root] = whole
        rows[0].update(everything)

    assert "masks of a partition overlap" in fault_after(overlapping)
    path = output / "masks/part-00000.parquet"
    plain = [{name: row[name] for name in MASKS_SCHEMA.names} for row in rows(output)[:2]]
    pq.write_table(pa.Table.from_pylist(plain, MASKS_SCHEMA.with_metadata(pq.read_metadata(path).metadata)), path)
    assert faults_of_shard(run.config.output, "masks", run.fingerprint, 0) == [
        "masks/part-00000.parquet: of another schema"
    ]


@pytest.mark.alone
def test_the_command_curates_on_ray_all_but_a_shard_that_fails(
    source: Run, tmp_path: Path, cluster: dict[str, str]
) -> None:
    expected = make(curated(source))
    damaged = Path(source.config.output.removeprefix("file://"), "masks/part-00001.parquet")
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-30])
    output = tmp_path / "by-ray"
    flags = ("--input", source.config.output, "--output", output, "--mask-iou-thresh", "0.8")
    flags += ("--hierarchy-thresh", "0.9", "--flatten", "smallest")
    ended = run("jobs.curate_masks", *flags, **cluster)
    assert ended.returncode == 1, ended.stderr
    assert "shard 1 is not made" in ended.stderr
    assert "jobs.verify_masks --remove-damaged" in ended.stderr
    assert rows(output) == [row for row in rows(expected) if row["image_id"] // 2 != 1]
    damaged.write_bytes(whole)
    again = curated(source, output=canonical_uri(str(output)))
    assert reconcile.shards_to_do(again) == [1]
    assert rows(make(again)) == rows(expected)
    assert (
        json.loads((output / "run.json").read_text())["fingerprint"]
        == json.loads((expected / "run.json").read_text())["fingerprint"]
    )
    assert call("jobs.verify_masks", "--output", output, "--processes", "1").returncode == 0
