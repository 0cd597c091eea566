"""What a finished run's command says by its exit code, without a Ray, as nothing is left to do.

Exit codes 2 and 3 are in test_refusals.py, 4 and 130 in test_end_to_end.py.
"""

from pathlib import Path

import pytest
import ray
from running import call, make_dataset, write_jpegs

from pipeline.config import AmgConfig, MasksConfig, ModelConfig


@pytest.fixture
def flags(tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> list[str | Path]:
    """Of a run that is finished, in three shards."""
    monkeypatch.setattr(ray, "init", None)
    folder = write_jpegs(tmp_path / "in", 3)
    config = MasksConfig(
        images=folder.as_uri(),
        output=(tmp_path / "out").as_uri(),
        images_per_shard=1,
        amg=AmgConfig(points_per_side=1),
        model=ModelConfig(checkpoint=tiny_checkpoint.as_uri(), device="cpu"),
    )
    make_dataset(config, tiny_checkpoint)
    where = ["--images", folder, "--output", tmp_path / "out", "--checkpoint", tiny_checkpoint]
    return [*where, "--images-per-shard", "1", "--points-per-side", "1"]


def test_exit_code_0_where_every_image_has_its_row(flags: list[str | Path]) -> None:
    done = call("jobs.generate_masks", *flags)
    assert done.returncode == 0, done.stderr
    assert "complete: 3 images" in done.stderr


def test_exit_code_1_where_a_shard_is_damaged(flags: list[str | Path], tmp_path: Path) -> None:
    (tmp_path / "out" / "masks" / "part-00001.parquet").write_bytes(b"PAR1")
    done = call("jobs.generate_masks", *flags)
    assert done.returncode == 1, done.stderr
    assert "1 of 3 images are not done" in done.stderr
    assert "--remove-damaged" in done.stderr


def test_exit_code_2_where_another_run_is_there(flags: list[str | Path]) -> None:
    done = call("jobs.generate_masks", *flags, "--min-mask-region-area", "5")
    assert done.returncode == 2, done.stderr
    assert "min_mask_region_area" in done.stderr
