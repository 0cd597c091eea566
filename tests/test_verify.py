"""Verification finds what is wrong with a finished dataset, and says where."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from running import run, write_jpegs

from pipeline import run as runs
from pipeline.amg import MaskGenerator
from pipeline.config import AmgConfig, RunConfig
from pipeline.model import load_model
from pipeline.shard import make_shard
from pipeline.storage import canonical_uri
from pipeline.verify import faults_of_shard
from schemas.masks import MASKS_SCHEMA

Rows = list[dict[str, Any]]


@pytest.fixture
def dataset(tmp_path: Path, tiny_checkpoint: Path) -> tuple[str, str]:
    """A finished dataset of three images in two shards: its address and its fingerprint."""
    folder = write_jpegs(tmp_path / "in", 3)
    (folder / "0002.jpg").write_bytes(b"")
    config = RunConfig(
        images=canonical_uri(str(folder)),
        output=canonical_uri(str(tmp_path / "out")),
        images_per_shard=2,
        amg=AmgConfig(points_per_side=1, pred_iou_thresh=-10, stability_score_thresh=0, box_nms_thresh=1),
    )
    model = load_model(str(tiny_checkpoint))
    opened = runs.open_run(config, model.weights_sha256, model.image_size)
    generator = MaskGenerator(model, **config.amg.model_dump())
    for shard in range(opened.shards):
        make_shard(shard, config, generator, opened.provenance)
    return config.output, opened.fingerprint


def shard_path(output: str, shard: int = 0) -> Path:
    return Path(output.removeprefix("file://")) / "masks" / f"part-{shard:05d}.parquet"


def rewrite(output: str, change: Callable[[Rows], Rows | None]) -> None:
    """Change the first shard's rows and keep its footer."""
    path = shard_path(output)
    rows = pq.read_table(path).to_pylist()
    changed = change(rows)
    schema = MASKS_SCHEMA.with_metadata(pq.read_metadata(path).metadata)
    pq.write_table(pa.Table.from_pylist(rows if changed is None else changed, schema), path)


def test_a_finished_dataset_has_no_faults(dataset: tuple[str, str]) -> None:
    assert faults_of_shard(*dataset, 0) == []
    assert faults_of_shard(*dataset, 1) == []


def test_case_43_a_truncated_or_missing_shard_is_named(dataset: tuple[str, str]) -> None:
    path = shard_path(dataset[0], 1)
    path.write_bytes(path.read_bytes()[:-20])
    (fault,) = faults_of_shard(*dataset, 1)
    assert fault.startswith("masks/part-00001.parquet: damaged")
    path.unlink()
    assert faults_of_shard(*dataset, 1) == ["masks/part-00001.parquet: missing"]
    assert faults_of_shard(*dataset, 0) == []


def test_a_bit_flipped_in_the_data_is_found(dataset: tuple[str, str]) -> None:
    path = shard_path(dataset[0])
    data = bytearray(path.read_bytes())
    metadata = pq.read_metadata(path)
    names = [metadata.row_group(0).column(i).path_in_schema for i in range(metadata.num_columns)]
    counts = metadata.row_group(0).column(next(i for i, n in enumerate(names) if n.endswith("counts")))
    data[(counts.dictionary_page_offset or counts.data_page_offset) + 60] ^= 0xFF
    path.write_bytes(data)
    assert faults_of_shard(*dataset, 0) != []


def _set(mask: int, **values: Any) -> Callable[[Rows], None]:
    return lambda rows: rows[0]["masks"][mask].update(values)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (_set(0, area=1), "mask 0: RLE of"),
        (_set(1, bbox=[0, 0, 1, 1]), "mask 1: RLE in the box"),
        (_set(2, segmentation={"size": [5, 5], "counts": "0i0"}), "mask 2: RLE of size"),
        (lambda rows: rows[:1], "1 rows for 2 images"),
        (lambda rows: [rows[0], rows[0]], "row of image 0 where image 1"),
        (lambda rows: rows[0].update(masks=[]), "status ok with 0 masks"),
        (lambda rows: rows[0].update(status="splendid"), "unknown status"),
        (lambda rows: rows[0].update(error="none really"), "with the error"),
    ],
)
def test_a_wrong_row_is_named(
    dataset: tuple[str, str], change: Callable[[Rows], Rows | None], complaint: str
) -> None:
    rewrite(dataset[0], change)
    faults = faults_of_shard(*dataset, 0)
    assert any(complaint in fault for fault in faults), faults


def test_a_shard_of_another_run_is_named(dataset: tuple[str, str]) -> None:
    (fault,) = faults_of_shard(dataset[0], "another", 0)
    assert "of another run" in fault


def test_the_command_names_faults_and_removes_damage(dataset: tuple[str, str]) -> None:
    output = dataset[0]
    assert run("jobs.verify_masks", "--output", output).returncode == 0
    path = shard_path(output, 1)
    path.write_bytes(b"PAR1")
    checked = run("jobs.verify_masks", "--output", output)
    assert checked.returncode == 1
    assert "masks/part-00001.parquet: damaged" in checked.stdout
    assert path.exists()
    assert run("jobs.verify_masks", "--output", output, "--remove-damaged").returncode == 1
    assert not path.exists()
    assert shard_path(output, 0).exists()


def test_an_address_without_a_run_is_said(tmp_path: Path) -> None:
    refused = run("jobs.verify_masks", "--output", tmp_path)
    assert refused.returncode == 2
    assert "run.json" in refused.stderr
