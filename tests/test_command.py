"""The command line: flags as a user types them, what a run's end leaves behind."""

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import NoReturn

import pytest
from cyclopts import App
from running import write_jpegs

from jobs import dataset
from jobs.generate_masks import generate_masks
from pipeline import reconcile
from pipeline import run as runs
from pipeline.config import LoadedWeights, MasksConfig
from pipeline.engine import make_shards
from pipeline.errors import StorageError, TooManyFailures
from pipeline.run import Run


def parsed(*words: str) -> MasksConfig:
    app = App()
    app.default(generate_masks)
    _, bound, _ = app.parse_args(["--images", "in", "--output", "out", *words], exit_on_error=False)
    config: MasksConfig = bound.arguments["config"]
    return config


def test_numbers_below_zero_and_sizes_with_units() -> None:
    config = parsed("--pred-iou-thresh", "-10", "--max-bytes", "512MiB", "--memory-budget", "1GiB")
    assert config.amg.pred_iou_thresh == -10
    assert (config.reading.max_bytes, config.amg.memory_budget) == (2**29, 2**30)
    assert parsed("--pred-iou-thresh=-10").amg.pred_iou_thresh == -10
    assert parsed("--overwrite").overwrite


@pytest.fixture
def run(tmp_path: Path) -> Run:
    write_jpegs(tmp_path / "in", 1)
    config = MasksConfig(images=f"file://{tmp_path}/in", output=f"file://{tmp_path}/out")
    return runs.open_run(config, LoadedWeights("0" * 64, 64, "mobile_sam", {}))


@pytest.mark.parametrize("error", [TooManyFailures("most of them"), KeyboardInterrupt(), OSError("no Ray")])
def test_a_summary_that_cannot_be_written_hides_no_error(
    run: Run,
    error: BaseException,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    def within() -> NoReturn:
        raise error

    (tmp_path / "out" / "summary.json").mkdir()
    with caplog.at_level(logging.ERROR), pytest.raises(type(error)) as raised:
        dataset.finish(run, make_shards, within)
    assert raised.value is error
    assert "summary.json is not written" in caplog.text


def test_a_summary_that_cannot_be_written_is_an_error_by_itself(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(reconcile, "shards_to_do", lambda run: [])
    (tmp_path / "out" / "summary.json").mkdir()
    with pytest.raises(StorageError, match=r"summary\.json"):
        dataset.finish(run, make_shards, nullcontext)
