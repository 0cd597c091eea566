"""`jobs.evaluate_model` as a user runs it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bsds_folder import write_bsds
from running import KEEP_ALL, call, run, write_jpegs

from jobs.evaluate_model import evaluate_model
from jobs.seeded_checkpoint import seeded_checkpoint
from pipeline.config import AmgConfig, ModelConfig
from pipeline.errors import NoImages, SettingsError, StorageError, TrainingDataError
from pipeline.evaluation.config import EvaluationConfig


@pytest.fixture(scope="module")
def bsds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two photographs of coloured quarters, marked by two people: in quarters, and in halves."""
    rows, columns = np.mgrid[:60, :80] // np.array([30, 40])[:, None, None]
    quarters, halves = (1 + 2 * rows + columns).astype(np.uint16), (1 + columns).astype(np.uint16)
    colours = np.array([[0, 0, 0], [250, 20, 20], [20, 250, 20], [20, 20, 250], [230, 230, 230]], np.uint8)
    return write_bsds(
        tmp_path_factory.mktemp("bsds"),
        {name: (np.roll(colours, shift, 0)[quarters], [quarters, halves]) for shift, name in enumerate("ab")},
    )


def tables_of(path: Path) -> dict[str, dict[str, Any]]:
    return {table["title"]: table for table in json.loads(path.read_text())["tables"]}


def records(table: dict[str, Any]) -> list[dict[str, Any]]:
    return [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]


def test_everything_at_once(tiny_checkpoint: Path, bsds: Path, tmp_path: Path) -> None:
    photographs = write_jpegs(tmp_path / "photographs", 3)
    flags = [
        *("--checkpoint", tiny_checkpoint, "--teacher-checkpoint", tiny_checkpoint, "--device", "cpu"),
        *("--bsds", bsds, "--scenes", "1", "--scene-size", "96", "--images", photographs, "--limit", "2"),
        *("--prompts-per-side", "3", "--peers", *KEEP_ALL),
    ]
    outputs = [tmp_path / "a.json", tmp_path / "b.json"]
    runs = [run("jobs.evaluate_model", *flags, "--output", outputs[0])]
    runs.append(call("jobs.evaluate_model", *flags, "--output", outputs[1]))
    assert [finished.returncode for finished in runs] == [0, 0], runs[0].stderr
    tables = tables_of(outputs[0])
    assert tables == tables_of(outputs[1])

    assert list(tables) == [
        "Against masks: BSDS500 val",
        "Masks against the teacher's: BSDS500 val",
        "Embeddings against the teacher's: BSDS500 val",
        "Against masks: held-out synthetic scenes",
        "Masks against the teacher's: held-out synthetic scenes",
        "Embeddings against the teacher's: held-out synthetic scenes",
        f"Masks against the teacher's: {photographs}",
        f"Embeddings against the teacher's: {photographs}",
    ]
    by_method = {row["method"]: row for row in records(tables["Against masks: BSDS500 val"])}
    methods = ["model", "teacher", "untrained", "Felzenszwalb, as many masks", "Felzenszwalb, all masks"]
    assert list(by_method) == methods
    assert by_method["model"] | {"method": ""} == by_method["teacher"] | {"method": ""}
    assert by_method["model"]["masks a picture"] == 12  # 2 x 2 prompts, three masks each
    assert by_method["model"]["segments"] == 2 * (4 + 2)
    assert by_method["Felzenszwalb, all masks"]["mIoU, best of 3"] > 0.75
    assert by_method["Felzenszwalb, all masks"]["coverage"] == 1
    for row in records(tables[f"Masks against the teacher's: {photographs}"]):
        assert row["mIoU"] == row["boundary IoU"] == (1 if row["prompts"] else None)
        assert row["teacher's mask"] != "all" or row["prompts"] == 2 * 9
    for row in records(tables[f"Embeddings against the teacher's: {photographs}"]):
        assert row["mean squared error"] == 0
        assert row["cosine"] == pytest.approx(1, abs=1e-6)

    printed = runs[0].stdout
    assert all(f"\n## {title}\n" in printed for title in tables)
    for what in ("model: ", "teacher: ", "device: cpu", "date: 20", f"torch {torch.__version__}", "--peers"):
        assert what in printed
    assert runs[0].stderr == ""  # no bar where there is no terminal


def test_markdown_and_a_teacher_of_another_size(bsds: Path, tmp_path: Path) -> None:
    model, teacher, output = (str(tmp_path / name) for name in ("m.safetensors", "t.safetensors", "out.md"))
    seeded_checkpoint(output=model, seed=1, image_size=64)
    seeded_checkpoint(output=teacher, seed=2, image_size=96)
    config = EvaluationConfig(
        bsds=bsds,
        limit=1,
        teacher_checkpoint=teacher,
        prompts_per_side=2,
        output=output,
        amg=AmgConfig(points_per_side=2),
        model=ModelConfig(checkpoint=model, device="cpu"),
    )
    assert evaluate_model(config=config) == 0
    text = Path(output).read_text()
    assert "| model | 1 | - | - |" in text
    assert "image sizes differ" in text


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({}, SettingsError("nothing to measure on")),
        ({"images": "BSDS"}, SettingsError("need a teacher")),
        ({"bsds": "BSDS", "teacher_image_size": 64}, SettingsError("without a teacher")),
        ({"bsds": "BSDS", "output": "tables.txt"}, SettingsError("json")),
        ({"bsds": "NOWHERE"}, TrainingDataError("no BSDS500")),
        ({"bsds": "BSDS", "split": "test"}, TrainingDataError("no BSDS500")),
        ({"images": "NOWHERE", "teacher_checkpoint": "NOWHERE"}, StorageError("nothing is there")),
        ({"images": "EMPTY", "teacher_checkpoint": "NOWHERE"}, NoImages("no picture")),
        ({"bsds": "BSDS", "teacher_checkpoint": "NOWHERE"}, StorageError("NOWHERE")),
    ],
)
def test_what_cannot_be_measured_is_said_first(
    settings: dict[str, Any],
    error: Exception,
    bsds: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "EMPTY").mkdir()
    places = {"BSDS": str(bsds)} | {name: str(tmp_path / name) for name in ("NOWHERE", "EMPTY")}
    settings = {name: places.get(value, value) for name, value in settings.items()}
    model = ModelConfig(checkpoint=str(tiny_checkpoint), device="cpu")
    with pytest.raises(type(error), match=str(error)):
        evaluate_model(config=EvaluationConfig(**settings, model=model))


def test_a_photograph_without_segmentations_is_named(tmp_path: Path, tiny_checkpoint: Path) -> None:
    copy = write_bsds(tmp_path / "copy", {"x": (np.zeros((8, 8, 3), np.uint8), [np.ones((8, 8), np.uint16)])})
    (copy / "groundTruth" / "val" / "x.mat").unlink()
    with pytest.raises(TrainingDataError, match=r"groundTruth/val/x\.mat"):
        evaluate_model(config=EvaluationConfig(bsds=copy, model=ModelConfig(checkpoint=str(tiny_checkpoint))))


def test_exit_codes(tiny_checkpoint: Path, bsds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for flags, code in (
        (["--bsds", bsds, "--device", "cuda"], 2),
        (["--bsds", tmp_path / "nowhere", "--device", "cuda"], 2),
        (["--bsds", tmp_path / "nowhere"], 3),
    ):
        finished = call("jobs.evaluate_model", "--checkpoint", tiny_checkpoint, *flags)
        assert finished.returncode == code, finished.stderr
        assert finished.stdout == ""
        assert len(finished.stderr.splitlines()) == 1
