"""Decoupled distillation of the weights that come along: killed, taken up again, nearer to the teacher."""

from pathlib import Path
from typing import Final

import numpy as np
import pytest
import torch
from PIL import Image
from running import kill_at_first_checkpoint, make_dataset, run
from seeded import reference_sam

from pipeline.config import AmgConfig, EmbeddingsConfig, ModelConfig
from pipeline.evaluation.against_teacher import StudentScores, measure
from pipeline.evaluation.pictures import Picture
from pipeline.model import load_model
from pipeline.model.weights import read_checkpoint
from pipeline.storage import canonical_uri
from pipeline.training.config import DistillConfig
from pipeline.training.distill import plan
from pipeline.training.scenes import HELD_OUT_SEED, scene

PICTURES, HELD_OUT, SIZE, STEPS = 40, 8, 96, 70
MARGIN: Final = 0.1
"""By which the student's mIoU to the teacher's masks must be above the untrained student's. Found: 0.19."""


def miou(scores: list[StudentScores]) -> float:
    """Of the teacher's masks and the best of the student's three, for one and two points."""
    return float(np.concatenate([score.agreement.best_N for score in scores]).mean())


@pytest.mark.long
def test_a_student_of_the_demo_teacher_beats_an_untrained_one(tmp_path: Path) -> None:
    pictures, store, output = tmp_path / "pictures", tmp_path / "store", tmp_path / "student.safetensors"
    pictures.mkdir()
    for index in range(PICTURES):
        Image.fromarray(scene(index, SIZE).rgb_HW3).save(pictures / f"{index:03d}.png")
    config = EmbeddingsConfig(
        images=canonical_uri(str(pictures)),
        output=canonical_uri(str(store)),
        images_per_shard=8,
        model=ModelConfig(model="demo", image_size=SIZE),
    )
    make_dataset(config, "demo")

    flags: list[str | Path] = ["--store", store, "--output", output, "--device", "cpu", "--steps", str(STEPS)]
    flags += ["--learning-rate", "1e-3", "--warmup-steps", "10", "--ema-decay", "0.97", "--precision", "fp32"]
    flags += ["--batch-size", "4", "--checkpoint-minutes", "0.02"]
    kill_at_first_checkpoint(output, "jobs.distill", *flags)
    assert 1 <= torch.load(f"{output}.training", weights_only=True)["position"]["step"] < STEPS
    done = run("jobs.distill", *flags)
    assert done.returncode == 0, done.stderr
    assert "going on: step" in done.stderr

    teacher, student = (load_model(name, "cpu", image_size=SIZE) for name in ("demo", str(output)))
    untrained = plan(DistillConfig(store=str(store), output=str(tmp_path / "untrained"))).model
    held_out = [Picture(f"scene {i}", scene(i, SIZE, HELD_OUT_SEED).rgb_HW3) for i in range(HELD_OUT)]
    scores = measure({"student": student, "untrained": untrained}, teacher, held_out, 4, AmgConfig())
    assert miou(scores["student"]) > miou(scores["untrained"]) + MARGIN
    reference_sam(SIZE).load_state_dict(dict(read_checkpoint(str(output)).tensors), strict=True)
