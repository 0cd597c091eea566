"""Decoupled distillation: students under their teacher's decoder, and the objective."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from huggingface_hub import constants
from running import call
from seeded import PHOTOGRAPHS, reference_sam
from small_distillation import SIZE, config_for
from timm.models import tiny_vit

from pipeline.amg.selfcheck import self_checking_checkpoint
from pipeline.errors import CheckpointError
from pipeline.model import load_model
from pipeline.model.sam import THRESHOLDS, TINY_VITS, Architecture
from pipeline.model.weights import (
    architecture_of,
    checkpoint_bytes,
    load_tensors,
    read_checkpoint,
    seeded_model,
)
from pipeline.training.config import Student
from pipeline.training.decoupled import STUDENTS, Distillation, Lessons, load_decoder, load_imagenet, student
from pipeline.training.distill import plan, train


@pytest.mark.parametrize("architecture", TINY_VITS)
def test_students_are_those_of_the_original_package(architecture: Architecture, tmp_path: Path) -> None:
    path = tmp_path / "student.safetensors"
    model = seeded_model(1, SIZE, architecture)
    path.write_bytes(checkpoint_bytes(model, {"image_size": SIZE}))
    reference = reference_sam(SIZE, TINY_VITS[architecture])
    reference.load_state_dict(read_checkpoint(str(path)).tensors, strict=True)
    reference.eval()
    loaded = load_model(str(path), "cpu")
    assert (loaded.architecture, loaded.image_size) == (architecture, SIZE)
    pixels, _ = loaded.preprocess(PHOTOGRAPHS["portrait"]())
    with torch.inference_mode():
        expected, found = reference.image_encoder(pixels), loaded.image_encoder(pixels)
    assert torch.allclose(found, expected, atol=1e-4)


def test_students_have_the_sizes_of_their_names() -> None:
    for name, million in {"tiny_vit_5m": 5, "tiny_vit_11m": 11, "tiny_vit_21m": 21}.items():
        encoder = seeded_model(0, SIZE, STUDENTS[name]).image_encoder
        of_body = sum(p.numel() for part, p in encoder.named_parameters() if not part.startswith("neck."))
        assert round(of_body / 1e6) == million
    another = {
        "image_encoder.patch_embed.seq.0.c.weight": torch.empty(0),
        "image_encoder.neck.0.weight": torch.empty(7),
    }
    assert architecture_of(another) == "mobile_sam"


def test_a_checkpoint_of_another_student_is_refused_by_name() -> None:
    large = safetensors.torch.load(checkpoint_bytes(seeded_model(0, SIZE, "tiny_vit_11m"), {}))
    with pytest.raises(CheckpointError, match=r"does not fit mobile_sam: .*head\.weight"):
        load_tensors(seeded_model(0, SIZE), large, "large.safetensors")


def test_the_decoder_is_the_teachers(teacher: Path, tmp_path: Path) -> None:
    original = read_checkpoint(str(teacher))
    made = student("tiny_vit_11m", SIZE, 3, str(teacher), original.sha256, imagenet=False)
    untrained = seeded_model(3, SIZE, "tiny_vit_11m").state_dict()
    for name, value in made.state_dict().items():
        expected = untrained if name.startswith("image_encoder.") else original.tensors
        assert torch.equal(value, expected[name]), name
    with pytest.raises(CheckpointError, match=f"not the teacher that made the store.*{'0' * 64}"):
        student("tiny_vit_5m", SIZE, 3, str(teacher), "0" * 64, imagenet=False)
    assert made.thresholds == THRESHOLDS
    tuned = load_model(str(teacher), "cpu")
    tuned.thresholds = {"pred_iou_thresh": 0.6, "stability_score_thresh": 0.75}
    path = tmp_path / "tuned.safetensors"
    path.write_bytes(self_checking_checkpoint(tuned))
    sha256 = read_checkpoint(str(path)).sha256
    assert student("tiny_vit_5m", SIZE, 3, str(path), sha256, imagenet=False).thresholds == tuned.thresholds
    part = {name: value for name, value in original.tensors.items() if name != "mask_decoder.iou_token.weight"}
    with pytest.raises(CheckpointError, match=r"cut does not fit mobile_sam: 1 missing: mask_decoder\.iou_token"):
        load_decoder(seeded_model(0, SIZE), part, "cut")


def imagenet_of(name: Student) -> dict[str, torch.Tensor]:
    """What timm's own classifier of that name consists of."""
    return dict(getattr(tiny_vit, f"{name}_224")(num_classes=21841).state_dict())


@pytest.mark.parametrize("name", STUDENTS)
def test_imagenet_weights_fill_all_but_the_neck(name: Student) -> None:
    model = seeded_model(0, SIZE, STUDENTS[name])
    neck = {part: value.clone() for part, value in model.image_encoder.neck.state_dict().items()}
    weights = imagenet_of(name)
    load_imagenet(model, weights)
    found = model.image_encoder.state_dict()
    assert all(torch.equal(found[f"neck.{part}"], value) for part, value in neck.items())
    body = [part for part in found if not part.startswith("neck.")]
    assert len(body) == len([part for part in weights if not part.startswith("head.")])
    assert all(torch.equal(found[part], weights[part]) for part in body)
    other: Student = "tiny_vit_21m" if name == "tiny_vit_5m" else "tiny_vit_5m"
    with pytest.raises(CheckpointError, match="do not fit the student: "):
        load_imagenet(seeded_model(0, SIZE, STUDENTS[other]), weights)
    weights.pop("patch_embed.conv1.conv.weight")
    with pytest.raises(CheckpointError, match=r"do not fit the student: patch_embed\.conv1\.conv\.weight\."):
        load_imagenet(model, weights)


def test_imagenet_weights_come_from_hugging_face_or_its_cache(
    tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--store", shared, "--output", tmp_path / "out.safetensors", "--imagenet", "--device", "cpu"]
    flags += ["--steps", "1", "--batch-size", "2", "--precision", "fp32", "--ema-decay", "0"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    refused = call("jobs.distill", *flags)
    assert refused.returncode == 3
    assert "Cannot get the ImageNet weights timm/tiny_vit_5m_224.dist_in22k from Hugging Face" in refused.stderr
    repository = tmp_path / "cache" / "models--timm--tiny_vit_5m_224.dist_in22k"
    revision = "0" * 40
    (repository / "snapshots" / revision).mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    weights = imagenet_of("tiny_vit_5m")
    safetensors.torch.save_file(weights, repository / "snapshots" / revision / "model.safetensors")
    done = call("jobs.distill", *flags)
    assert done.returncode == 0, done.stderr
    trained = read_checkpoint(str(tmp_path / "out.safetensors")).tensors
    stem = "image_encoder.patch_embed.seq.0.c.weight"
    # One step at a 250th of the learning rate is next to nothing.
    assert torch.allclose(trained[stem], weights["patch_embed.conv1.conv.weight"], atol=1e-4)


def test_padding_does_not_count_unless_it_is_to() -> None:
    model = seeded_model(0, SIZE)
    rng = torch.Generator().manual_seed(0)
    batch = Lessons(
        ("a", "b"),
        torch.randint(0, 256, (2, 3, SIZE, SIZE), dtype=torch.uint8, generator=rng),
        torch.tensor([[64, 33], [16, 64]]),
        torch.randn(2, 256, 4, 4, generator=rng).half(),
    )
    with torch.no_grad():
        error = (model.image_encoder(batch.inputs_B3SS) - batch.targets_BCGG.float()) ** 2
        masked = Distillation(model)(batch, 0)["loss"]
        whole = Distillation(model, with_padding=True)(batch, 0)["loss"]
    counted = torch.cat([error[0, :, :, :3].flatten(), error[1, :, :1].flatten()])
    assert float(masked) == pytest.approx(float(counted.mean()), rel=1e-5)
    assert float(whole) == pytest.approx(float(error.mean()), rel=1e-5)
    assert abs(float(masked) - float(whole)) > 1e-3


def test_only_the_encoder_learns(shared: Path, teacher: Path, tmp_path: Path) -> None:
    made = plan(config_for(shared, tmp_path / "out.safetensors", steps=2))
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    training = train(made, torch.device("cpu"))
    for name, value in training.model.named_parameters():
        assert torch.equal(value, before[name]) != name.startswith("image_encoder."), name
