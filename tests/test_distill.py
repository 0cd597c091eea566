"""`jobs.distill`: the training, resume, refusals, and Ray Train."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from running import TIMEOUT_S, call, command, kill_at_first_checkpoint, wait_for_ray_workers
from seeded import PHOTOGRAPHS, reference_sam
from small_distillation import SIZE, config_for, ids, lessons, order_of, write_store
from torch import nn

from jobs.distill import distill
from jobs.seeded_checkpoint import seeded_checkpoint
from pipeline.amg.selfcheck import checked_model
from pipeline.config import ModelConfig
from pipeline.errors import Diverged, SettingsError, TrainingDataError
from pipeline.model import load_model
from pipeline.model.sam import SamModel
from pipeline.model.weights import (
    published_name,
    published_tensors,
    read_checkpoint,
)
from pipeline.training.config import DescentConfig, DistillConfig, OptimizerConfig
from pipeline.training.decoupled import Distillation, Lessons
from pipeline.training.distill import plan, train
from pipeline.training.loop import Training


def state_of(output: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(f"{output}.training", weights_only=True)
    return state


class Killed(Exception):
    """Ends a training as a kill would, right after a checkpoint."""


def curve(config: DistillConfig, until: int | None = None) -> list[float]:
    """The smoothed loss after each step that is made, from the checkpoint on if there is one."""
    losses: list[float] = []

    def on_step(training: Training) -> None:
        losses.append(training.position.losses["loss"])
        if training.position.step == until:
            raise Killed

    with suppress(Killed):
        train(plan(config), torch.device("cpu"), on_step=on_step)
    return losses


def test_a_killed_training_goes_on_as_if_nothing_had_been(shared: Path, tmp_path: Path) -> None:
    whole = curve(config_for(shared, tmp_path / "whole"))
    again = config_for(shared, tmp_path / "again", checkpoint_minutes=1e-9, read_ahead=1)
    losses = curve(again, until=2) + curve(again, until=5) + curve(again)
    assert len(losses) == len(whole) == 6
    assert losses == pytest.approx(whole, abs=1e-7)
    assert len(set(whole)) == 6
    assert (tmp_path / "again").read_bytes() == (tmp_path / "whole").read_bytes()
    assert curve(again) == []
    assert len(curve(again.model_copy(update={"overwrite": True}), until=1)) == 1


def test_the_loss_falls_and_the_answers_come_nearer(shared: Path, tmp_path: Path) -> None:
    descent = DescentConfig(precision="fp32", warmup_steps=1, learning_rate=3e-3, ema_decay=0.5)
    made = plan(config_for(shared, tmp_path / "out", steps=12, descent=descent))
    (batch,) = lessons(order_of(shared, batch_size=22, shards_mixed=6), 1)

    def loss(model: SamModel) -> float:
        with torch.inference_mode():
            return float(Distillation(model.train())(batch, 0)["loss"])

    before = loss(made.model)
    after = loss(train(made, torch.device("cpu")).model)  # type: ignore[arg-type]
    assert after < 0.95 * before


def without_ray(*arguments: str | Path) -> list[str]:
    """`python -m`, where Ray cannot be imported."""
    code = (
        "import sys, runpy; sys.modules['ray'] = None; sys.argv = sys.argv[1:]; "
        "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
    )
    return [sys.executable, "-c", code, *map(str, arguments)]


def test_the_command_killed_and_started_again_without_ray(shared: Path, teacher: Path, tmp_path: Path) -> None:
    flags = ["--store", shared, "--device", "cpu", "--precision", "fp32", "--warmup-steps", "4"]
    flags += ["--batch-size", "4", "--steps", "8"]
    output, whole = tmp_path / "killed.safetensors", tmp_path / "whole.safetensors"
    kill_at_first_checkpoint(output, "jobs.distill", *flags, "--output", output, "--checkpoint-minutes", "1e-9")
    assert 1 <= state_of(output)["position"]["step"] < 8
    done = subprocess.run(
        without_ray("jobs.distill", *flags, "--output", output),
        check=False,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr
    assert "22 images in 6 shards; 8 steps of 4" in done.stderr
    assert "going on: step" in done.stderr
    undisturbed = call("jobs.distill", *flags, "--output", whole)
    assert undisturbed.returncode == 0, undisturbed.stderr
    assert "going on" not in undisturbed.stderr
    losses = [state_of(target)["position"]["losses"]["loss"] for target in (output, whole)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert output.read_bytes() == whole.read_bytes()

    # What came out is a whole SAM: here, with its own answers, and in the original package.
    model = checked_model(ModelConfig(checkpoint=str(output), model="mobile_sam", device="cpu"))
    assert model.expected is not None
    tensors = read_checkpoint(str(output)).tensors
    reference = reference_sam(SIZE)
    reference.load_state_dict(tensors, strict=True)
    picture = PHOTOGRAPHS["coffee"]()
    with torch.inference_mode():
        expected = reference.eval().image_encoder(model.preprocess(picture)[0])
    assert torch.allclose(model.encode(picture).features_1CHW, expected, atol=1e-4)
    original = read_checkpoint(str(teacher)).tensors
    for name, value in tensors.items():
        if not name.startswith("image_encoder."):
            assert torch.equal(value, original[name]), name


def test_another_store_is_refused(shared: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    curve(config_for(shared, output, checkpoint_minutes=1e-9), until=1)
    before = Path(f"{output}.training").read_bytes()

    def refusal(other: Path) -> str:
        with pytest.raises(TrainingDataError, match="is of another training") as error:
            distill(config=config_for(other, output))
        assert Path(f"{output}.training").read_bytes() == before
        return str(error.value)

    def other_teacher(name: str, seed: int, size: int) -> Path:
        path = tmp_path / f"{name}.safetensors"
        seeded_checkpoint(output=str(path), seed=seed, image_size=size)
        return path

    same_teacher = Path(_document(shared)["settings"]["model"]["checkpoint"].removeprefix("file://"))
    facts = {name: _document(shared)["determinants"][name] for name in ("weights_sha256", "image_size")}
    message = refusal(write_store(tmp_path, "teacher", other_teacher("b", 6, SIZE)))
    assert f"store's weights_sha256 ({facts['weights_sha256']} there" in message
    assert "image_size" not in message
    message = refusal(write_store(tmp_path, "size", other_teacher("c", 5, 80)))
    assert "store's image_size (64 there, 80 here)" in message
    message = refusal(write_store(tmp_path, "images", same_teacher, images=24))
    assert "store's manifest_digest" in message
    assert "weights_sha256" not in message
    with pytest.raises(TrainingDataError, match=r"learning_rate.*seed \(0 there, 1 here\)"):
        distill(config=config_for(shared, output, seed=1, descent=DescentConfig(learning_rate=1)))


def _document(store: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((store / "run.json").read_text())
    return document


def test_a_loss_that_is_no_number_ends_it(shared: Path, tmp_path: Path) -> None:
    descent = DescentConfig(precision="fp32", warmup_steps=0, learning_rate=1e30, clip=0)
    config = config_for(shared, tmp_path / "out", descent=descent, checkpoint_minutes=1e-9)
    second = ids(lessons(order_of(shared, shards_mixed=4), 1, 1))[0]
    named = ", ".join(f"image {image_id}" for image_id in second)
    with pytest.raises(Diverged, match=rf"The loss of step 1 is .*The batch holds {named}\.") as error:
        distill(config=config)
    assert error.value.exit_code == 5
    assert state_of(tmp_path / "out")["position"]["step"] == 1
    assert all(value.isfinite().all() for value in state_of(tmp_path / "out")["objective"].values())
    assert not (tmp_path / "out").exists()


def test_settings_are_checked_before_anything_is_read(tmp_path: Path) -> None:
    gpus = torch.cuda.device_count()
    too_many = {"num_workers": gpus + 1, "batch_size": gpus + 1, "device": "cuda"}
    with pytest.raises(SettingsError, match=f"there are {gpus} here" if gpus else "no cuda device"):
        distill(config=config_for(tmp_path / "nowhere", tmp_path / "out", **too_many))
    if not gpus:
        with pytest.raises(SettingsError, match="no cuda device"):
            distill(config=config_for(tmp_path / "nowhere", tmp_path / "out", device="cuda"))
    with pytest.raises(TrainingDataError, match=r"no run\.json"):
        distill(config=config_for(tmp_path / "nowhere", tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_epochs_make_steps(shared: Path, tmp_path: Path) -> None:
    for epochs, batch, steps in ((8, 8, 16), (0.5, 4, 2), (1, 4, 5), (0.01, 4, 1), (2, 50, 2)):
        config = config_for(shared, tmp_path / "out", epochs=epochs, batch_size=batch, steps=None)
        assert plan(config).steps == steps


# Ray Train


class BothShares(nn.Module):
    """What two workers do together: the mean of the losses of their shares of a batch."""

    def __init__(self, objective: Distillation) -> None:
        super().__init__()
        self._objective = objective

    def forward(self, batch: "Pair", number: int) -> dict[str, torch.Tensor]:
        losses = [self._objective(share, number)["loss"] for share in batch.shares]
        return {"loss": torch.stack(losses).mean()}


@dataclass(frozen=True)
class Pair:
    shares: tuple[Lessons, Lessons]
    names: tuple[str, ...] = ()

    def to(self, device: torch.device) -> "Pair":
        return self


def ray_flags(store: Path, output: Path, steps: int) -> list[str | Path]:
    """With a checkpoint after each step."""
    flags: list[str | Path] = ["--store", store, "--output", output, "--device", "cpu", "--precision", "fp32"]
    flags += ["--batch-size", "4", "--steps", str(steps), "--num-workers", "2"]
    return [*flags, "--checkpoint-minutes", "1e-9"]


@pytest.mark.alone
def test_two_workers_by_ray_train_one_of_which_is_lost_do_what_one_would(shared: Path, tmp_path: Path) -> None:
    output, log, steps = tmp_path / "ray.safetensors", tmp_path / "log", 6
    flags = [*ray_flags(shared, output, steps), "--warmup-steps", "8", "--ema-decay", "0"]
    with log.open("w") as stream:
        process = subprocess.Popen(command("jobs.distill", *flags), stderr=stream)
    deadline = time.monotonic() + TIMEOUT_S
    try:
        while not Path(f"{output}.training").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        workers = wait_for_ray_workers(process, "ray::RayTrainWorker", 2)
        os.kill(workers[-1].pid, signal.SIGKILL)
        assert process.wait(TIMEOUT_S) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
    text = log.read_text()
    assert "workers failed, starting them anew" in text
    begun = re.search(r"going on: step (\d+),", text)
    assert begun
    assert 1 <= int(begun[1]) < steps
    assert f"step {steps}, 100.0 %" in text
    assert load_model(str(output), "cpu").image_size == SIZE

    made = plan(config_for(shared, output, steps=steps, num_workers=2))
    optimizer = OptimizerConfig(steps=steps, warmup_steps=8, precision="fp32", ema_decay=0)
    training = Training(BothShares(Distillation(made.model)), made.model, optimizer)
    shares = [lessons(made.order, steps, rank=rank) for rank in range(2)]
    training.run([Pair(pair) for pair in zip(*shares, strict=True)], 1.0)
    found = read_checkpoint(str(output)).tensors
    encoder = published_tensors(made.model)
    all_differing = []
    for name, parameter in made.model.named_parameters():
        published = published_name("mobile_sam", name)
        # Adam takes a step of full size where a gradient is next to nothing, and rounding decides its sign.
        differing = (found[published] - encoder[published]).abs() > 2e-5
        assert differing.float().mean() < 0.05, name
        all_differing.append(differing.flatten())
        assert parameter.requires_grad == name.startswith("image_encoder.")
    assert torch.cat(all_differing).float().mean() < 1e-3
    position = state_of(output)["position"]
    assert position["step"] == steps
    assert math.isclose(position["losses"]["loss"], training.position.losses["loss"], rel_tol=1e-4)


@pytest.mark.alone
def test_what_a_worker_raises_is_the_commands_exit_code(
    shared: Path, tmp_path: Path, cluster: dict[str, str]
) -> None:
    output = tmp_path / "ray.safetensors"
    hopeless = ["--learning-rate", "1e30", "--warmup-steps", "0", "--clip", "0"]
    done = subprocess.run(
        command("jobs.distill", *ray_flags(shared, output, 4), *hopeless),
        check=False,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env=os.environ | cluster,
    )
    assert done.returncode == 5, done.stderr
    [message] = [line for line in done.stderr.splitlines() if line.split(" ", 2)[-1].startswith("Diverged: ")]
    assert len(re.findall(r"image \d+", message)) == 4  # of both workers
    assert "starting them anew" not in done.stderr
    assert not output.exists()
    assert state_of(output)["position"]["step"] == 1
