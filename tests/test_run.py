"""A run's documents, without Ray: begin, take up again, refuse, reconcile."""

import json
from pathlib import Path
from typing import Any

import pytest
from running import decode_here, write_jpegs
from s3server import S3Server

from pipeline import documents, reconcile
from pipeline import run as runs
from pipeline.config import (
    AmgConfig,
    ClusterConfig,
    EmbeddingsConfig,
    LoadedWeights,
    MasksConfig,
    ModelConfig,
    RunConfig,
)
from pipeline.errors import NoImages, OutputConflict, SettingsError, StorageError
from pipeline.model import SamModel, load_model
from pipeline.model.sam import THRESHOLDS
from pipeline.plan import Counts
from pipeline.predict import content_of
from pipeline.run import Run
from pipeline.shard import ShardSummary, make_shard
from pipeline.storage import canonical_uri, s3

WEIGHTS = LoadedWeights("0" * 64, 64, "mobile_sam", THRESHOLDS)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> SamModel:
    return load_model(str(tiny_checkpoint))


def settings(tmp_path: Path, **changes: Any) -> MasksConfig:
    fields: dict[str, Any] = {
        "images": canonical_uri(str(tmp_path / "in")),
        "output": canonical_uri(str(tmp_path / "out")),
        "images_per_shard": 2,
        "amg": AmgConfig(points_per_side=1, pred_iou_thresh=-10, stability_score_thresh=0),
    }
    return MasksConfig(**fields | changes)


def opened(config: RunConfig) -> Run:
    return runs.open_run(config, WEIGHTS)


def make(run: Run, shard: int, model: SamModel) -> ShardSummary:
    return make_shard(shard, run.config, content_of(run.config, model), decode_here(run.config), run.provenance)


def test_a_run_begins_with_a_manifest_and_a_document(tmp_path: Path) -> None:
    write_jpegs(tmp_path / "in", 5)
    (tmp_path / "in" / "notes.json").write_text("{}")
    run = opened(settings(tmp_path))
    assert run.plan.counts == Counts(5, 3, 0, {".json": 1})
    document = json.loads((tmp_path / "out" / "run.json").read_text())
    assert document["fingerprint"] == run.fingerprint
    assert document["determinants"]["weights_sha256"] == WEIGHTS.sha256
    assert document["settings"]["amg"]["points_per_side"] == 1
    assert document["everymask"]
    assert (tmp_path / "out" / "manifest" / "part-00000.parquet").exists()


def test_resume_is_the_shards_without_a_file(tmp_path: Path, model: SamModel) -> None:
    write_jpegs(tmp_path / "in", 5)
    run = opened(settings(tmp_path))
    assert reconcile.shards_to_do(run) == [0, 1, 2]
    make(run, 1, model)
    assert reconcile.shards_to_do(opened(settings(tmp_path))) == [0, 2]


def test_the_listing_is_not_made_again(tmp_path: Path) -> None:
    folder = write_jpegs(tmp_path / "in", 3)
    opened(settings(tmp_path))
    (folder / "0000.jpg").rename(folder / "9999.jpg")
    (folder / "0003.jpg").write_bytes(b"")
    assert opened(settings(tmp_path)).images == 3


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"images_per_shard": 3}, "images_per_shard"),
        ({"amg": AmgConfig(points_per_side=2)}, "amg.points_per_side"),
        ({"model": ModelConfig(precision="bf16")}, "precision"),
    ],
)
def test_case_31_another_run_is_refused_with_both_fingerprints(
    tmp_path: Path, change: dict[str, Any], name: str
) -> None:
    write_jpegs(tmp_path / "in", 1)
    first = opened(settings(tmp_path)).fingerprint
    with pytest.raises(OutputConflict) as refusal:
        opened(settings(tmp_path, **change))
    assert first in str(refusal.value)
    assert name in str(refusal.value)
    assert "--overwrite" in str(refusal.value)


def test_other_weights_are_another_run(tmp_path: Path) -> None:
    write_jpegs(tmp_path / "in", 1)
    opened(settings(tmp_path))
    with pytest.raises(OutputConflict, match="weights_sha256"):
        runs.open_run(settings(tmp_path), WEIGHTS._replace(sha256="1" * 64))
    with pytest.raises(OutputConflict, match="image_size"):
        runs.open_run(settings(tmp_path), WEIGHTS._replace(image_size=128))


def embeddings(tmp_path: Path, **changes: Any) -> EmbeddingsConfig:
    """The same pictures and the same output, to be embedded."""
    common = settings(tmp_path).model_dump(include=set(RunConfig.model_fields) - {"reading", "images_per_shard"})
    return EmbeddingsConfig(**common | {"images_per_shard": 2} | changes)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_of_another_kind_is_refused_and_kept(tmp_path: Path, model: SamModel, overwrite: bool) -> None:
    write_jpegs(tmp_path / "in", 2)
    make(opened(settings(tmp_path)), 0, model)
    with pytest.raises(OutputConflict, match="holds a run of masks, this one makes embeddings"):
        opened(embeddings(tmp_path, overwrite=overwrite))
    (tmp_path / "out" / "run.json").unlink()
    with pytest.raises(OutputConflict, match="holds a run of masks"):
        opened(embeddings(tmp_path, overwrite=overwrite))
    assert documents.shards_done(settings(tmp_path).output, "masks") == {0}


def test_the_teacher_decides_what_embeddings_are(tmp_path: Path) -> None:
    write_jpegs(tmp_path / "in", 1)
    run = opened(embeddings(tmp_path))
    assert run.determinants["schema"] == {"manifest": 1, "embeddings": 1}
    assert "amg" not in run.determinants
    assert opened(embeddings(tmp_path, max_bytes=1)).fingerprint == run.fingerprint
    others = {"architecture": "vit_b", "sha256": "1" * 64, "image_size": 128}
    for name, value in others.items():
        with pytest.raises(OutputConflict, match=name):
            runs.open_run(embeddings(tmp_path), WEIGHTS._replace(**{name: value}))
    with pytest.raises(OutputConflict, match="precision"):
        opened(embeddings(tmp_path, model=ModelConfig(precision="bf16")))
    with pytest.raises(OutputConflict, match="holds a run of embeddings, this one makes masks"):
        opened(settings(tmp_path))


def test_what_only_changes_speed_is_the_same_run(tmp_path: Path) -> None:
    write_jpegs(tmp_path / "in", 1)
    first = opened(settings(tmp_path)).fingerprint
    faster = settings(
        tmp_path,
        amg=settings(tmp_path).amg.model_copy(update={"points_per_batch": 1, "memory_budget": 1}),
        cluster=ClusterConfig(num_workers=7),
        max_failure_rate=1,
    )
    assert opened(faster).fingerprint == first


def test_overwrite_begins_anew(tmp_path: Path, model: SamModel) -> None:
    write_jpegs(tmp_path / "in", 5)
    run = opened(settings(tmp_path))
    make(run, 0, model)
    (tmp_path / "out" / "mine.txt").write_text("not everymask's")
    for name in ("progress.json", "summary.json"):
        (tmp_path / "out" / name).write_text("{}")
    again = opened(settings(tmp_path, images_per_shard=5, overwrite=True))
    assert again.shards == 1
    assert reconcile.shards_to_do(again) == [0]
    assert (tmp_path / "out" / "mine.txt").exists()
    assert not {"progress.json", "summary.json"} & {path.name for path in (tmp_path / "out").iterdir()}


def test_overwrite_deletes_nothing_before_there_is_something_new(tmp_path: Path, model: SamModel) -> None:
    write_jpegs(tmp_path / "in", 2)
    make(opened(settings(tmp_path)), 0, model)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")}
    (tmp_path / "empty").mkdir()
    for name, error in {"mistyped": StorageError, "empty": NoImages}.items():
        other = settings(tmp_path, images=canonical_uri(str(tmp_path / name)), overwrite=True)
        for step in (runs.check_addresses, opened):
            with pytest.raises(error, match=name):
                step(other)

    def refuse(run: Run) -> None:
        raise SettingsError(f"{run.images} are too many")

    with pytest.raises(SettingsError, match="2 are too many"):
        runs.open_run(settings(tmp_path, images_per_shard=1, overwrite=True), WEIGHTS, refuse)
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")} == before


def test_what_the_check_raises_is_raised_of_a_run_that_is_taken_up_too(tmp_path: Path) -> None:
    def refuse(run: Run) -> None:
        raise SettingsError(f"{run.images} are too many")

    write_jpegs(tmp_path / "in", 2)
    with pytest.raises(SettingsError, match="2 are too many"):
        runs.open_run(settings(tmp_path), WEIGHTS, refuse)
    assert not (tmp_path / "out").exists()
    opened(settings(tmp_path))
    with pytest.raises(SettingsError, match="2 are too many"):
        runs.open_run(settings(tmp_path), WEIGHTS, refuse)


def test_the_input_of_a_run_that_is_taken_up_must_still_answer(tmp_path: Path) -> None:
    folder = write_jpegs(tmp_path / "in", 2)
    opened(settings(tmp_path))
    runs.check_addresses(settings(tmp_path))
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="nothing is there") as refusal:
        runs.check_addresses(settings(tmp_path))
    assert refusal.value.exit_code == 3
    folder.mkdir()
    with pytest.raises(NoImages):
        runs.check_addresses(settings(tmp_path))


def test_wrong_credentials_are_noticed_when_a_run_is_taken_up(
    tmp_path: Path, s3_server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3_server.put(f"{bucket}/in/a.jpg", b"an image")
    config = settings(tmp_path, images=f"{bucket}/in")
    opened(config)
    try:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        s3.client.cache_clear()
        with pytest.raises(StorageError, match="check the credentials"):
            runs.check_addresses(config)
    finally:
        s3.client.cache_clear()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"fingerprint": "f", "determinants": {"schema": {}}}'])
def test_a_damaged_document_is_said(tmp_path: Path, text: str) -> None:
    write_jpegs(tmp_path / "in", 1)
    opened(settings(tmp_path))
    (tmp_path / "out" / "run.json").write_text(text)
    for overwrite in (False, True):
        with pytest.raises(OutputConflict, match=r"run\.json is damaged"):
            opened(settings(tmp_path, overwrite=overwrite))


def test_shards_of_unknown_origin_are_refused(tmp_path: Path, model: SamModel) -> None:
    write_jpegs(tmp_path / "in", 2)
    make(opened(settings(tmp_path)), 0, model)
    (tmp_path / "out" / "run.json").unlink()
    with pytest.raises(OutputConflict, match=r"no run\.json"):
        opened(settings(tmp_path))


def test_retry_failed_does_shards_with_failures_again(tmp_path: Path, model: SamModel) -> None:
    folder = write_jpegs(tmp_path / "in", 4)
    (folder / "0002.jpg").write_bytes(b"not yet an image")
    run = opened(settings(tmp_path))
    for shard in (0, 1):
        make(run, shard, model)
    assert reconcile.shards_to_do(opened(settings(tmp_path))) == []
    assert reconcile.shards_to_do(opened(settings(tmp_path, retry_failed=True))) == [1]


def test_case_30_output_inside_input_is_refused(tmp_path: Path) -> None:
    write_jpegs(tmp_path / "in", 1)
    for output in ("in/out", "in"):
        with pytest.raises(OutputConflict, match="inside the input"):
            runs.check_addresses(settings(tmp_path, output=canonical_uri(str(tmp_path / output))))
        assert not (tmp_path / "in" / "out").exists()
    beside = settings(tmp_path, output=canonical_uri(str(tmp_path / "in-masks")))
    runs.check_addresses(beside)


def test_case_22_no_image_is_an_error_unless_allowed(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "readme.txt").write_text("none here")
    with pytest.raises(NoImages, match=r"1 \.txt"):
        runs.check_addresses(settings(tmp_path))
    allowed = settings(tmp_path, allow_empty=True)
    runs.check_addresses(allowed)
    run = opened(allowed)
    assert (run.images, run.shards) == (0, 0)
    assert reconcile.write_summary(run, "complete", {}, 1.0)["state"] == "complete"


def test_case_23_an_output_that_cannot_be_written_fails_early(tmp_path: Path) -> None:
    write_jpegs(tmp_path / "in", 1)
    (tmp_path / "out").write_text("a file where a folder should be")
    with pytest.raises(StorageError, match=r"cannot write .*/out/"):
        runs.check_addresses(settings(tmp_path))


def test_the_probe_leaves_nothing(tmp_path: Path) -> None:
    write_jpegs(tmp_path / "in", 1)
    runs.check_addresses(settings(tmp_path))
    assert list((tmp_path / "out").iterdir()) == []


def test_the_summary_reconciles(tmp_path: Path, model: SamModel) -> None:
    folder = write_jpegs(tmp_path / "in", 5)
    (folder / "0001.jpg").write_bytes(b"")
    run = opened(settings(tmp_path))
    make(run, 0, model)
    summary = reconcile.write_summary(run, "interrupted", {}, 2.0)
    assert (summary["images"], summary["ok"], summary["failed"], summary["not_done"]) == (5, 1, 1, 3)
    assert summary["failures"] == {"empty_file": 1}
    assert summary["missing_shards"] == [1, 2]
    made = {shard: make(run, shard, model) for shard in (1, 2)}
    summary = reconcile.write_summary(run, "complete", made, 2.0)
    assert summary["images"] == summary["ok"] + summary["empty"] + summary["failed"] == 5
    assert (summary["state"], summary["images_per_second"]) == ("complete", 1.5)
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary


def test_a_damaged_shard_is_not_counted_as_done(tmp_path: Path, model: SamModel) -> None:
    write_jpegs(tmp_path / "in", 4)
    run = opened(settings(tmp_path))
    made = {shard: make(run, shard, model) for shard in (0, 1)}
    path = tmp_path / "out" / "masks" / "part-00001.parquet"
    data = path.read_bytes()
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    for damaged in (data[:-40], data[:footer] + bytes(8) + data[footer + 8 :]):
        path.write_bytes(damaged)
        summary = reconcile.write_summary(run, "complete", {0: made[0]}, 1.0)
        assert (summary["state"], summary["not_done"]) == ("incomplete", 2)
        assert (summary["missing_shards"], summary["damaged_shards"]) == ([], [1])


def test_no_credentials_in_documents(tmp_path: Path) -> None:
    write_jpegs(tmp_path / "in", 1)
    secret = settings(tmp_path, model=ModelConfig(checkpoint="https://me:hunter2@example.org/x.pt?sig=hunter3"))
    opened(secret)
    text = (tmp_path / "out" / "run.json").read_text()
    assert "example.org" in text
    assert "hunter" not in text
