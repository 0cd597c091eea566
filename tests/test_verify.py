"""Verification finds what is wrong with a finished dataset, and says where."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from running import call, make_dataset, run, write_jpegs

from pipeline.config import AmgConfig, EmbeddingsConfig, Kind, MasksConfig
from pipeline.contents import rows_of
from pipeline.storage import canonical_uri
from pipeline.verify import faults_of_shard

Rows = list[dict[str, Any]]
Dataset = tuple[str, Kind, str]
"""Address, kind, fingerprint."""


@pytest.fixture
def dataset(tmp_path: Path, tiny_checkpoint: Path) -> Dataset:
    """Masks of three images in two shards."""
    folder = write_jpegs(tmp_path / "in", 3)
    (folder / "0002.jpg").write_bytes(b"")
    config = MasksConfig(
        images=canonical_uri(str(folder)),
        output=canonical_uri(str(tmp_path / "out")),
        images_per_shard=2,
        amg=AmgConfig(points_per_side=1, pred_iou_thresh=-10, stability_score_thresh=0, box_nms_thresh=1),
    )
    return config.output, "masks", make_dataset(config, tiny_checkpoint).fingerprint


@pytest.fixture
def store(tmp_path: Path, tiny_checkpoint: Path) -> Dataset:
    """Embeddings of three images in two shards, of which the last is of an image that failed."""
    folder = write_jpegs(tmp_path / "in", 3)
    (folder / "0002.jpg").write_bytes(b"")
    config = EmbeddingsConfig(
        images=canonical_uri(str(folder)), output=canonical_uri(str(tmp_path / "out")), images_per_shard=2
    )
    return config.output, "embeddings", make_dataset(config, tiny_checkpoint).fingerprint


def shard_path(output: str, shard: int = 0, kind: Kind = "masks") -> Path:
    return Path(output.removeprefix("file://")) / kind / f"part-{shard:05d}.parquet"


def rewrite(output: str, change: Callable[[Rows], Rows | None], kind: Kind = "masks") -> None:
    """Change the first shard's rows and keep its footer."""
    path = shard_path(output, kind=kind)
    table = pq.read_table(path)
    rows = rows_of(table)
    changed = change(rows)
    for row in rows:
        if row.get("embedding") is not None:
            row["embedding"] = row["embedding"].reshape(-1)
    schema = table.schema.with_metadata(pq.read_metadata(path).metadata)
    pq.write_table(pa.Table.from_pylist(rows if changed is None else changed, schema), path)


def test_a_finished_dataset_has_no_faults(dataset: Dataset) -> None:
    assert faults_of_shard(*dataset, 0) == []
    assert faults_of_shard(*dataset, 1) == []


def test_case_43_a_truncated_or_missing_shard_is_named(dataset: Dataset) -> None:
    path = shard_path(dataset[0], 1)
    path.write_bytes(path.read_bytes()[:-20])
    (fault,) = faults_of_shard(*dataset, 1)
    assert fault.startswith("masks/part-00001.parquet: damaged")
    path.unlink()
    assert faults_of_shard(*dataset, 1) == ["masks/part-00001.parquet: missing"]
    assert faults_of_shard(*dataset, 0) == []


def test_a_bit_flipped_in_the_data_is_found(dataset: Dataset) -> None:
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
def test_a_wrong_row_is_named(dataset: Dataset, change: Callable[[Rows], Rows | None], complaint: str) -> None:
    rewrite(dataset[0], change)
    faults = faults_of_shard(*dataset, 0)
    assert any(complaint in fault for fault in faults), faults


def test_a_store_of_embeddings_is_checked(store: Dataset) -> None:
    assert faults_of_shard(*store, 0) == []
    assert faults_of_shard(*store, 1) == []
    path = shard_path(store[0], kind="embeddings")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1  # in the embeddings, where every number is a number
    path.write_bytes(data)
    (fault,) = faults_of_shard(*store, 0)
    assert fault.startswith("embeddings/part-00000.parquet: damaged")


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"embedding": None}, "image 0: status ok with no embedding"),
        ({"status": "truncated", "error": "cut"}, "image 0: status truncated with an embedding"),
        ({"status": "empty", "embedding": None}, "image 0: status empty with no embedding"),
        ({"embedding": np.full((256, 4, 4), np.inf, np.float16)}, "image 0: its embedding is not finite"),
        ({"input_width": 63}, "image 0: input of 48 x 63, the image's is 48 x 64"),
        ({"width": None}, "image 0: its size is missing"),
        ({"image_id": 7}, "row of image 7 where image 0"),
    ],
)
def test_a_wrong_row_of_embeddings_is_named(store: Dataset, values: dict[str, Any], complaint: str) -> None:
    rewrite(store[0], lambda rows: rows[0].update(values), "embeddings")
    faults = faults_of_shard(*store, 0)
    assert any(complaint in fault for fault in faults), faults


def test_embeddings_of_another_size_are_of_another_schema(store: Dataset) -> None:
    path = shard_path(store[0], kind="embeddings")
    table = pq.read_table(path)
    smaller = pa.ExtensionArray.from_storage(
        pa.fixed_shape_tensor(pa.float16(), (256, 16)), table["embedding"].combine_chunks().storage
    )
    changed = table.set_column(8, "embedding", smaller)
    footer = {"everymask": pq.read_metadata(path).metadata[b"everymask"]}
    pq.write_table(changed.replace_schema_metadata(footer), path)
    assert faults_of_shard(*store, 0) == ["embeddings/part-00000.parquet: of another schema"]


def test_a_shard_of_another_run_is_named(dataset: Dataset) -> None:
    (fault,) = faults_of_shard(dataset[0], "masks", "another", 0)
    assert "of another run" in fault


def test_the_command_names_faults_and_removes_damage(dataset: Dataset) -> None:
    output = dataset[0]
    assert run("jobs.verify_masks", "--output", output, "--processes", "2").returncode == 0
    path = shard_path(output, 1)
    path.write_bytes(b"PAR1")
    checked = call("jobs.verify_masks", "--output", output, "--processes", "1")
    assert checked.returncode == 1
    assert "masks/part-00001.parquet: damaged" in checked.stdout
    assert path.exists()
    assert call("jobs.verify_masks", "--output", output, "--processes", "1", "--remove-damaged").returncode == 1
    assert not path.exists()
    assert shard_path(output, 0).exists()


def test_the_command_names_what_stands_between_the_shards_and_a_changed_manifest(dataset: Dataset) -> None:
    output = dataset[0]
    path = shard_path(output, 1)
    for name in ("part-00002.parquet", "part-1.parquet"):
        path.with_name(name).write_bytes(path.read_bytes())
    path.with_name("notes.txt").write_text("mine")
    checked = call("jobs.verify_masks", "--output", output, "--processes", "1")
    assert checked.returncode == 1
    assert checked.stdout.splitlines() == [
        f"masks/{name}: no shard of this run, which has 2" for name in ("part-00002.parquet", "part-1.parquet")
    ]
    document = path.parent.parent / "run.json"
    digest = json.loads(document.read_text())["manifest"]["digest"]
    document.write_text(document.read_text().replace(digest, "0" * 64))
    again = call("jobs.verify_masks", "--output", output, "--processes", "1", "--remove-damaged")
    assert again.returncode == 1
    assert again.stdout.splitlines()[0] == f"manifest: its digest is {digest}, run.json says {'0' * 64}"
    assert sorted(file.name for file in path.parent.iterdir()) == [
        "notes.txt",
        "part-00000.parquet",
        "part-00001.parquet",
    ]


def test_an_address_without_a_run_is_said(tmp_path: Path) -> None:
    refused = call("jobs.verify_masks", "--output", tmp_path)
    assert refused.returncode == 2
    assert "run.json" in refused.stderr
