"""`jobs.embed_images` as a user runs it: on a local Ray, taken up again, refused."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from running import call, make_dataset, run, write_jpegs

from pipeline.config import EmbeddingsConfig, ModelConfig
from pipeline.model.weights import DEMO, read_checkpoint
from pipeline.storage import canonical_uri
from pipeline.training.store import open_store, read_shard


def flags(folder: Path, output: Path, checkpoint: Path) -> list[str | Path]:
    return ["--images", folder, "--output", output, "--checkpoint", checkpoint]


@pytest.mark.alone
def test_embed_verify_resume_and_refuse(tmp_path: Path, tiny_checkpoint: Path, cluster: dict[str, str]) -> None:
    folder = write_jpegs(tmp_path / "in", 4)
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (folder / "notes.txt").write_text("not an image")
    output = tmp_path / "out"
    given = flags(folder, output, tiny_checkpoint)
    make_dataset(
        EmbeddingsConfig(images=canonical_uri(str(folder)), output=canonical_uri(str(output)), images_per_shard=2),
        tiny_checkpoint,
    )
    shard = output / "embeddings" / "part-00001.parquet"
    before = pq.read_table(output / "embeddings")
    others = {path: path.stat().st_mtime_ns for path in shard.parent.iterdir() if path != shard}
    shard.unlink()
    checked = call("jobs.verify_masks", "--output", output)
    assert (checked.returncode, checked.stdout) == (1, "embeddings/part-00001.parquet: missing\n")

    done = run("jobs.embed_images", *given, "--images-per-shard", "2", "--cpus-per-worker", "1", **cluster)
    assert done.returncode == 0, done.stderr
    assert "5 images in 3 shards, 1 to do" in done.stderr
    assert "5 images x 0.007812 MiB = 3.815e-05 GiB of embeddings" in done.stderr
    assert "complete: 5 images = 4 ok + 0 empty + 1 failed (1 truncated) + 0 not done; " in done.stderr
    assert "masks" not in done.stderr
    assert {path: path.stat().st_mtime_ns for path in others} == others
    assert pq.read_table(output / "embeddings").equals(before)
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["ok"], summary["failed"], summary["skipped"]) == (4, 1, {".txt": 1})
    assert call("jobs.verify_masks", "--output", output).returncode == 0

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
    config = EmbeddingsConfig(
        images=canonical_uri(str(folder)), output=canonical_uri(str(output)), model=ModelConfig(model="demo")
    )
    make_dataset(config, "demo")
    size = read_checkpoint("demo").metadata["image_size"]
    sha256 = hashlib.sha256(DEMO.read_bytes()).hexdigest()
    store = open_store(str(output), expect={"image_size": size, "weights_sha256": sha256})
    stored = list(read_shard(store, 0))
    assert len(stored) == 2
    for one in stored:
        assert one.embedding_CGG.shape == (256, size // 16, size // 16)
        assert one.embedding_CGG.astype(np.float32).std() > 0.1
