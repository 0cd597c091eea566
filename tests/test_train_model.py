"""`jobs.train_model` as a user runs it, and its settings."""

import logging
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bsds_folder import write_bsds
from pydantic import ValidationError
from running import call, kill_at_first_checkpoint, make_dataset, run
from seeded import reference_sam
from small_training import masks_dataset, steps

from jobs.train_model import sources, train_model
from pipeline import storage
from pipeline.amg.selfcheck import self_checking_checkpoint
from pipeline.config import ImagesConfig
from pipeline.errors import Diverged, TrainingDataError
from pipeline.model import load_model
from pipeline.model.weights import read_checkpoint, seeded_model
from pipeline.training.config import TrainConfig
from pipeline.training.masks import MasksSource
from pipeline.training.scenes import HELD_OUT_SEED

ONE = {"a": (np.zeros((40, 60, 3), np.uint8), [np.ones((40, 60), np.uint16)])}


def flags(output: Path, count: int) -> list[str]:
    return [
        f"--output={output}",
        "--scenes=1",
        "--stages=64:2:0.5",
        "--stages=96:1:1",
        f"--steps={count}",
        "--prompts=2",
        "--precision=fp32",
        "--grouping=1",
        "--grouping-steps=3",
        "--loaders=0",
        "--device=cpu",
    ]


def test_killed_and_started_again_it_makes_the_same_weights(tmp_path: Path) -> None:
    """And they load here, and strictly in the original package."""
    whole, killed = tmp_path / "whole.safetensors", tmp_path / "killed.safetensors"
    assert call("jobs.train_model", *flags(whole, 12)).returncode == 0
    kill_at_first_checkpoint(killed, "jobs.train_model", *flags(killed, 12), "--checkpoint-minutes=0.0001")
    other = call("jobs.train_model", *flags(killed, 12), f"--bsds={write_bsds(tmp_path / 'bsds', ONE, 'train')}")
    assert other.returncode == 3
    assert "bsds (None there" in other.stderr
    finished = run("jobs.train_model", *flags(killed, 12))
    assert finished.returncode == 0
    assert "going on: step" in finished.stderr
    one, other = read_checkpoint(str(whole)), read_checkpoint(str(killed))
    for name, value in one.tensors.items():
        torch.testing.assert_close(other.tensors[name], value, atol=1e-5, rtol=1e-4)
    assert load_model(str(whole)).image_size == 96
    reference_sam().load_state_dict(dict(one.tensors), strict=True)


def config_for(output: Path, **changed: Any) -> TrainConfig:
    """Of a training that takes a second."""
    few = {"stages": ("64:1:1",), "prompts": 1, "loaders": 0, "device": "cpu", "optimizer": steps(2)}
    return TrainConfig(**{"output": str(output), **few, **changed})


def test_overwrite_leaves_nothing_of_the_old_training(tmp_path: Path) -> None:
    output, state = tmp_path / "x.safetensors", tmp_path / "x.safetensors.training"
    config = config_for(output, scenes=1)
    assert train_model(config=config) == 0
    assert state.exists()
    hopeless = steps(3, learning_rate=1e30, clip=0, warmup_steps=0)
    other = config.model_copy(update={"optimizer": hopeless})
    with pytest.raises(TrainingDataError, match="learning_rate"):
        train_model(config=other)
    assert state.exists()
    with pytest.raises(Diverged):
        train_model(config=other.model_copy(update={"overwrite": True}))
    assert not state.exists()


def test_output_and_checkpoint_may_be_on_s3(bucket: str, caplog: pytest.LogCaptureFixture) -> None:
    output = f"{bucket}/folder/x.safetensors"
    config = config_for(output, scenes=1)
    with caplog.at_level(logging.INFO, "everymask"):
        assert train_model(config=config) == 0
        assert "going on" not in caplog.text
        assert train_model(config=config) == 0
    assert "going on: step 2" in caplog.text
    assert load_model(output, "cpu").image_size == 64
    with pytest.raises(TrainingDataError, match=r"seed \(0 there, 1 here\)"):
        train_model(config=config_for(output, scenes=1, seed=1))
    storage.delete(f"{output}.training")
    assert train_model(config=config_for(output, scenes=1, seed=1)) == 0


def test_masks_photographs_and_scenes_make_a_model(tmp_path: Path, tiny_checkpoint: Path) -> None:
    masks = masks_dataset(tmp_path, tiny_checkpoint, 3)
    folder = write_bsds(tmp_path / "bsds", ONE, "train")
    config = config_for(tmp_path / "x", masks=masks.output, bsds=folder, scenes=1)
    source = sources(config, MasksSource(masks.output))(config.parts[0])
    rng = np.random.default_rng(0)
    names = [source(rng).name for _ in range(90)]
    kinds = Counter("scene" if name.startswith("scene") else Path(name).suffix or name for name in names)
    assert kinds.keys() == {"scene", ".jpg", "a"}
    assert min(kinds.values()) >= 15
    output = tmp_path / "x.safetensors"
    done = run(
        "jobs.train_model",
        *(f"--output={output}", f"--masks={masks.output}", f"--bsds={folder}", f"--checkpoint={tiny_checkpoint}"),
        *("--stages=64:3:1", "--steps=4", "--prompts=2", "--warmup-steps=0", "--device=cpu", "--precision=fp32"),
    )
    assert done.returncode == 0, done.stderr
    assert "step 4, 100.0 %" in done.stderr
    before, after = (read_checkpoint(str(path)).tensors for path in (tiny_checkpoint, output))
    assert not torch.equal(after["mask_decoder.iou_token.weight"], before["mask_decoder.iou_token.weight"])
    assert all(value.isfinite().all() for value in after.values())


def test_other_weights_or_masks_under_the_same_address_are_refused(tmp_path: Path, tiny_checkpoint: Path) -> None:
    masks = masks_dataset(tmp_path, tiny_checkpoint, 2)
    weights, output = tmp_path / "weights.safetensors", tmp_path / "x.safetensors"
    weights.write_bytes(tiny_checkpoint.read_bytes())
    config = config_for(output, masks=masks.output, checkpoint=str(weights))
    train_model(config=config)
    before = Path(f"{output}.training").read_bytes()
    moved = weights.rename(tmp_path / "moved.safetensors")
    assert train_model(config=config.model_copy(update={"checkpoint": str(moved)})) == 0
    weights.write_bytes(self_checking_checkpoint(seeded_model(9, 64)))
    with pytest.raises(
        TrainingDataError, match=r"of another training: checkpoint's SHA-256 \(.* there, .* here\)\."
    ):
        train_model(config=config)
    moved.rename(weights)
    shutil.rmtree(masks.output)
    make_dataset(masks.model_copy(update={"reading": ImagesConfig(max_pixels=10**6)}), tiny_checkpoint)
    with pytest.raises(
        TrainingDataError, match=r"of another training: masks' fingerprint \(.* there, .* here\)\."
    ):
        train_model(config=config)
    assert train_model(config=config.model_copy(update={"overwrite": True})) == 0
    assert Path(f"{output}.training").read_bytes() != before


@pytest.mark.parametrize(
    "changed",
    [
        *({"stages": (text,)} for text in ("60:1:1", "48:1:1", "64:0:1", "64:1:0.5", "64:1", "a:1:1")),
        {"stages": ("64:1:0", "64:1:1")},
        {"stages": ("64:1:0.7", "64:1:0.7", "64:1:1")},
        {"stages": ("64:1:1.5", "64:1:1")},
        {"stages": ()},
        {"seed": HELD_OUT_SEED},
        {"seed": -1},
    ],
)
def test_bad_settings_are_found_when_they_are_made(changed: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        config_for(Path("x"), scenes=1, **changed)
    assert config_for(Path("x"), scenes=1, stages=("64:1:0.5", "96:2:1")).parts[1].pictures == 2


def test_scenes_are_drawn_as_large_as_what_is_cut_from_them() -> None:
    drawn = {
        (stage.image_size, stages): sources(config, None)(stage)(np.random.default_rng(0))
        for stages in (("256:1:0.5", "512:1:1"), ("64:1:0.5", "384:1:0.7", "512:1:1"), ("64:1:1",))
        for config in [config_for(Path("x"), scenes=1, stages=stages)]
        for stage in config.parts
    }
    found = {key[0]: (example.rgb_HW3.shape[0], example.part) for key, example in drawn.items() if len(key[1]) > 1}
    assert found == {64: (256, 0.5), 256: (256, 0.5), 384: (384, 0.75), 512: (512, 1)}
    assert drawn[64, ("64:1:1",)].rgb_HW3.shape == (64, 64, 3)


def test_bad_settings_end_before_training(tmp_path: Path) -> None:
    for flag in ("--stages=60:1:1", "--stages=64:1", f"--seed={HELD_OUT_SEED}"):
        refused = call("jobs.train_model", f"--output={tmp_path}/x", "--steps=1", "--scenes=1", flag)
        assert refused.returncode == 2, refused.stderr
    endless = call("jobs.train_model", f"--output={tmp_path}/x", "--scenes=1")
    assert endless.returncode == 2
    assert "give steps or minutes" in endless.stderr
    nothing = call("jobs.train_model", f"--output={tmp_path}/x", "--steps=1")
    assert nothing.returncode == 2
    assert "nothing to train on" in nothing.stderr
    nowhere = call("jobs.train_model", f"--output={tmp_path}/x", "--steps=1", f"--bsds={tmp_path}")
    assert nowhere.returncode == 3
    assert "no BSDS500" in nowhere.stderr
    no_gpu = call("jobs.train_model", f"--output={tmp_path}/x", "--steps=1", f"--bsds={tmp_path}", "--device=cuda")
    assert (no_gpu.returncode, "no cuda device" in no_gpu.stderr) == (2, True) or torch.cuda.is_available()
    assert not list(tmp_path.iterdir())
