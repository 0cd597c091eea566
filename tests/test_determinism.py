"""The rows are the same whoever makes the shards, in which order, how large, how often, and at what time."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from running import decode_here, jpeg, rows, write_jpegs

from pipeline import reconcile
from pipeline import run as runs
from pipeline.config import AmgConfig, MasksConfig
from pipeline.model import load_model
from pipeline.predict import content_of, weights_of
from pipeline.run import Run
from pipeline.shard import make_shard
from pipeline.verify import faults_of_shard

IMAGES = 12


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of several sizes, one of them bad."""
    folder = write_jpegs(tmp_path_factory.mktemp("pictures") / "in", IMAGES - 2)
    (folder / "0003a.jpg").write_bytes(b"<html>")
    (folder / "0007a.jpg").write_bytes(jpeg(20, (150, 90)))
    return folder


def settings(pictures: Path, output: Path, images_per_shard: int) -> MasksConfig:
    return MasksConfig(
        images=pictures.as_uri(),
        output=output.as_uri(),
        images_per_shard=images_per_shard,
        amg=AmgConfig(points_per_side=2, pred_iou_thresh=-10, stability_score_thresh=0),
    )


def content_hash(output: Path) -> str:
    """Of all rows, by image."""
    return hashlib.sha256(json.dumps(rows(output)).encode()).hexdigest()


def worker(run: Run, checkpoint: Path, shards: list[int]) -> None:
    """With a model of its own."""
    content = content_of(run.config, load_model(str(checkpoint)))
    for shard in shards:
        make_shard(shard, run.config, content, decode_here(run.config), run.provenance)


@pytest.fixture(scope="module")
def expected(pictures: Path, tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> str:
    """One worker, one shard."""
    output = tmp_path_factory.mktemp("expected") / "out"
    run = runs.open_run(settings(pictures, output, 100), weights_of(load_model(str(tiny_checkpoint))))
    worker(run, tiny_checkpoint, [0])
    statuses = [row["status"] for row in rows(output)]
    assert statuses.count("ok") == IMAGES - 1
    return content_hash(output)


@pytest.mark.parametrize(
    ("images_per_shard", "workers"),
    [(1, [[11, 0, 10, 1, 9, 2, 8, 3, 7, 4, 6, 5]]), (5, [[2, 0], [1]]), (4, [[0, 1], [1, 0, 2, 0]])],
    ids=["out of order", "two workers", "shards made again"],
)
def test_rows_depend_on_nothing_but_images_and_settings(
    images_per_shard: int,
    workers: list[list[int]],
    *,
    expected: str,
    pictures: Path,
    tmp_path: Path,
    tiny_checkpoint: Path,
) -> None:
    config = settings(pictures, tmp_path / "out", images_per_shard)
    run = runs.open_run(config, weights_of(load_model(str(tiny_checkpoint))))
    with ThreadPoolExecutor(len(workers)) as pool:
        list(pool.map(lambda shards: worker(run, tiny_checkpoint, shards), workers))
    assert content_hash(tmp_path / "out") == expected


def test_case_37_two_runs_on_one_output_at_once(
    expected: str, pictures: Path, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    """Both harmless: they begin at the same time, number the images the same, and write the same shards."""
    config = settings(pictures, tmp_path / "out", 2)
    weights = weights_of(load_model(str(tiny_checkpoint)))
    together = Barrier(2)

    def run_of(_: Any) -> Run:
        together.wait()
        run = runs.open_run(config, weights)
        worker(run, tiny_checkpoint, reconcile.shards_to_do(run))
        return run

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(run_of, range(2))
    assert (one.config, one.fingerprint, one.plan.counts) == (other.config, other.fingerprint, other.plan.counts)
    assert content_hash(tmp_path / "out") == expected
    for shard in range(one.shards):
        assert faults_of_shard(config.output, "masks", one.fingerprint, shard) == []
    assert reconcile.write_summary(one, "complete", {}, 1.0)["ok"] == IMAGES - 1
