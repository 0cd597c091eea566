"""`jobs.embed_images` as a user runs it: on a local Ray, taken up again, refused."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from running import call, run, write_jpegs

from pipeline.model.weights import DEMO, read_checkpoint
from pipeline.training.store import open_store, read_shard

pytestmark = pytest.mark.alone


def flags(folder: Path, output: Path, checkpoint: Path) -> list[str | Path]:
    return ["--images", folder, "--output", output, "--checkpoint", checkpoint]


def test_embed_verify_resume_and_refuse(tmp_path: Path, tiny_checkpoint: Path) -> None:
    folder = write_jpegs(tmp_path / "in", 4)
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (folder / "notes.txt").write_text("not an image")
    output = tmp_path / "out"
    given = flags(folder, output, tiny_checkpoint)
    first = run("jobs.embed_images", *given, "--images-per-shard", "2")
    assert first.returncode == 0, first.stderr
    assert "5 images x 0.007812 MiB = 3.815e-05 GiB of embeddings" in first.stderr
    assert "complete: 5 images = 4 ok + 0 empty + 1 failed (1 truncated) + 0 not done; " in first.stderr
    assert "masks" not in first.stderr
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["ok"], summary["failed"], summary["skipped"]) == (4, 1, {".txt": 1})
    assert call("jobs.verify_masks", "--output", output).returncode == 0

    shard = output / "embeddings" / "part-00001.parquet"
    before = pq.read_table(output / "embeddings")
    shard.unlink()
    checked = call("jobs.verify_masks", "--output", output)
    assert (checked.returncode, checked.stdout) == (1, "embeddings/part-00001.parquet: missing\n")
    again = run("jobs.embed_images", *given, "--images-per-shard", "2")
    assert again.returncode == 0, again.stderr
    assert "5 images in 3 shards, 1 to do" in again.stderr
    assert pq.read_table(output / "embeddings").equals(before)

    other = call("jobs.embed_images", *given, "--images-per-shard", "3")
    assert other.returncode == 2
    assert "images_per_shard" in other.stderr

    store = open_store(str(output), expect={"image_size": 64})
    assert [stored.uri[-8:] for shard in range(3) for stored in read_shard(store, shard)] == [
        f"{index:04d}.jpg" for index in range(4)
    ]


def test_the_weights_that_come_along_can_be_the_teacher(tmp_path: Path) -> None:
    folder = write_jpegs(tmp_path / "in", 2)
    output = tmp_path / "out"
    done = run("jobs.embed_images", "--images", folder, "--output", output, "--model", "demo")
    assert done.returncode == 0, done.stderr
    size = read_checkpoint("demo").metadata["image_size"]
    sha256 = hashlib.sha256(DEMO.read_bytes()).hexdigest()
    store = open_store(str(output), expect={"image_size": size, "weights_sha256": sha256})
    stored = list(read_shard(store, 0))
    assert len(stored) == 2
    for one in stored:
        assert one.embedding_CGG.shape == (256, size // 16, size // 16)
        assert one.embedding_CGG.astype(np.float32).std() > 0.1
