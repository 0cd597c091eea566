"""Decoupled distillation: students, lessons from a teacher store, the command, resume, and Ray Train."""

import io
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from PIL import Image
from pydantic import ValidationError
from running import TIMEOUT_S, command, kill_at_first_checkpoint, make_dataset, run
from seeded import PHOTOGRAPHS, reference_sam
from timm.models import tiny_vit
from torch import nn

from jobs.distill import distill
from jobs.seeded_checkpoint import seeded_checkpoint
from pipeline.amg.selfcheck import checked_model, self_checking_checkpoint
from pipeline.config import EmbeddingsConfig, ModelConfig
from pipeline.errors import CheckpointError, Diverged, SettingsError, StorageError, TrainingDataError
from pipeline.model import load_model
from pipeline.model.sam import THRESHOLDS, TINY_VITS, Architecture, SamModel, resized
from pipeline.model.weights import (
    architecture_of,
    checkpoint_bytes,
    load_tensors,
    published_name,
    published_tensors,
    read_checkpoint,
    seeded_model,
)
from pipeline.storage import canonical_uri
from pipeline.training.config import DescentConfig, DistillConfig, OptimizerConfig, Student
from pipeline.training.decoupled import STUDENTS, Distillation, Lessons, load_decoder, load_imagenet, student
from pipeline.training.distill import plan, train
from pipeline.training.lessons import LessonReader, Order
from pipeline.training.loop import Training
from pipeline.training.scenes import scene
from pipeline.training.store import open_store

IMAGES, PER_SHARD, SIZE = 22, 4, 64
SLOW_START: Final = DescentConfig(precision="fp32", warmup_steps=4)


def write_store(folder: Path, name: str, teacher: Path, images: int = IMAGES) -> Path:
    """Scenes of three shapes, and what a teacher makes of them, in shards of 4."""
    pictures = folder / f"{name}-pictures"
    pictures.mkdir()
    for index in range(images):
        rgb = scene(index, 96).rgb_HW3
        Image.fromarray((rgb, rgb[:60], rgb[:, :70])[index % 3]).save(pictures / f"{index:03d}.png")
    config = EmbeddingsConfig(
        images=canonical_uri(str(pictures)),
        output=canonical_uri(str(folder / name)),
        images_per_shard=PER_SHARD,
        model=ModelConfig(checkpoint=canonical_uri(str(teacher))),
    )
    make_dataset(config, teacher)
    return folder / name


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    seeded_checkpoint(output=str(path), seed=5, image_size=SIZE)
    return path


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    """A store of 22 images in 6 shards, which no test changes."""
    return write_store(tmp_path_factory.mktemp("shared"), "store", teacher)


@pytest.fixture
def store(tmp_path: Path, teacher: Path) -> Path:
    """The same, for tests that change it; its pictures are in `store-pictures` beside it."""
    return write_store(tmp_path, "store", teacher)


def config_for(store: Path, output: Path, **changed: Any) -> DistillConfig:
    few = {"batch_size": 4, "steps": 6, "device": "cpu", "descent": SLOW_START}
    return DistillConfig(**{"store": str(store), "output": str(output), **few, **changed})


def order_of(store: Path, **changed: int) -> Order:
    few = {"batch_size": 4, "workers": 1, "shards_mixed": 2, "seed": 0}
    return Order.of(open_store(str(store)), **few | changed)


def lessons(order: Order, count: int, first: int = 0, rank: int = 0, read_ahead: int = 3) -> list[Lessons]:
    with closing(LessonReader(order, rank, read_ahead=read_ahead).batches(first)) as batches:
        return list(islice(batches, count))


def ids(batches: list[Lessons]) -> list[list[int]]:
    return [[int(name.removeprefix("image ")) for name in batch.names] for batch in batches]


def same(a: Lessons, b: Lessons) -> bool:
    pairs = zip(vars(a).values(), vars(b).values(), strict=True)
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


# Students


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


def test_imagenet_weights_come_from_hugging_face_or_its_cache(tmp_path: Path, shared: Path) -> None:
    flags = ["--store", shared, "--output", tmp_path / "out.safetensors", "--imagenet", "--device", "cpu"]
    flags += ["--steps", "1", "--batch-size", "2", "--precision", "fp32", "--ema-decay", "0"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "cache")}
    refused = run("jobs.distill", *flags, **offline)
    assert refused.returncode == 3
    assert "Cannot get the ImageNet weights timm/tiny_vit_5m_224.dist_in22k from Hugging Face" in refused.stderr
    repository = tmp_path / "cache" / "models--timm--tiny_vit_5m_224.dist_in22k"
    revision = "0" * 40
    (repository / "snapshots" / revision).mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    weights = imagenet_of("tiny_vit_5m")
    safetensors.torch.save_file(weights, repository / "snapshots" / revision / "model.safetensors")
    done = run("jobs.distill", *flags, **offline)
    assert done.returncode == 0, done.stderr
    trained = read_checkpoint(str(tmp_path / "out.safetensors")).tensors
    stem = "image_encoder.patch_embed.seq.0.c.weight"
    # One step at a 250th of the learning rate is next to nothing.
    assert torch.allclose(trained[stem], weights["patch_embed.conv1.conv.weight"], atol=1e-4)


# Lessons


def test_pixels_are_exactly_those_of_the_model() -> None:
    model = seeded_model(0, SIZE)
    for name in ("portrait", "coffee", "square", "small"):
        rgb = PHOTOGRAPHS[name]()
        small = resized(rgb, SIZE)
        height, width = small.shape[:2]
        pixels = np.full((3, SIZE, SIZE), 7, np.uint8)  # what stands in the padding does not matter
        pixels[:, :height, :width] = small.transpose(2, 0, 1)
        batch = Lessons(
            (name,), torch.from_numpy(pixels)[None], torch.tensor([[height, width]]), torch.zeros(1, 256, 4, 4)
        )
        expected, size = model.preprocess(rgb)
        assert size == (height, width)
        assert torch.equal(batch.inputs_B3SS, expected)


def test_lessons_are_the_pictures_and_what_the_teacher_makes_of_them(shared: Path, teacher: Path) -> None:
    model = load_model(str(teacher), "cpu")
    (batch,) = lessons(order_of(shared, batch_size=22, shards_mixed=6), 1)
    assert sorted(ids([batch])[0]) == list(range(IMAGES))
    for i, image_id in enumerate(ids([batch])[0]):
        picture = np.array(Image.open(shared.parent / "store-pictures" / f"{image_id:03d}.png"))
        pixels, size = model.preprocess(picture)
        assert torch.equal(batch.inputs_B3SS[i], pixels[0])
        assert batch.input_sizes_B2[i].tolist() == list(size)
        assert torch.equal(batch.targets_BCGG[i], model.encode(picture).features_1CHW[0].half())
    assert len({tuple(size) for size in batch.input_sizes_B2.tolist()}) == 3


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


# Order


def test_an_epoch_shows_each_picture_once_in_another_order(shared: Path) -> None:
    order = order_of(shared, batch_size=2)
    assert order.steps_per_epoch == 11
    seen = [
        [image_id for batch in ids(lessons(order, 11, 11 * epoch)) for image_id in batch] for epoch in range(3)
    ]
    for epoch in seen:
        assert sorted(epoch) == list(range(IMAGES))
    assert len({tuple(epoch) for epoch in seen}) == 3
    other = ids(lessons(order_of(shared, batch_size=2, seed=1), 11))
    assert [image_id for batch in other for image_id in batch] != seen[0]


def test_shards_are_mixed_and_shuffled(shared: Path) -> None:
    def shards_in_order(mixed: int) -> list[int]:
        order = order_of(shared, batch_size=1, shards_mixed=mixed)
        return [batch[0] // PER_SHARD for batch in ids(lessons(order, IMAGES))]

    alone, mixed = shards_in_order(1), shards_in_order(3)
    assert sum(a != b for a, b in pairwise(alone)) == 5  # one shard after another
    assert alone != sorted(alone)
    assert sum(a != b for a, b in pairwise(mixed)) > 8
    rows = [batch[0] % PER_SHARD for batch in ids(lessons(order_of(shared, batch_size=1, shards_mixed=1), 8))]
    assert rows != [0, 1, 2, 3] * 2


def test_a_batch_follows_from_its_number(shared: Path) -> None:
    order = order_of(shared)
    whole = lessons(order, 13)
    for first in (1, 4, 5, 12):
        for read_ahead in (1, 40):
            later = lessons(order, 13 - first, first, read_ahead=read_ahead)
            assert all(same(a, b) for a, b in zip(whole[first:], later, strict=True))


def test_the_same_shards_are_shuffled_otherwise_in_each_epoch(shared: Path) -> None:
    reader = LessonReader(order_of(shared), 0, read_ahead=3, shards=lambda _epoch: [2])
    with closing(reader.batches(0)) as batches:
        seen = ids(list(islice(batches, 20)))
    assert all(sorted(batch) == [8, 9, 10, 11] for batch in seen)  # begun again five times an epoch
    assert len({tuple(batch) for batch in seen[::5]}) > 1


def test_workers_share_an_epoch(shared: Path) -> None:
    order = order_of(shared, batch_size=4, workers=2)
    assert order.share == 2
    for epoch in range(3):
        steps = order.steps_per_epoch
        seen = [
            [image_id for batch in ids(lessons(order, steps, epoch * steps, rank)) for image_id in batch]
            for rank in range(2)
        ]
        assert not set(seen[0]) & set(seen[1])
        assert [len(part) for part in seen] == [10, 10]
        for rank, part in enumerate(seen):
            assert {image_id // PER_SHARD for image_id in part} <= set(order.shards(rank, epoch))
    with pytest.raises(SettingsError, match="6 shards, too few for 7 workers"):
        order_of(shared, batch_size=7, workers=7)
    with pytest.raises(ValidationError, match="a batch of 8 cannot be divided by 3 workers"):
        config_for(shared, Path("out"), batch_size=8, num_workers=3)


def test_a_worker_with_few_pictures_begins_again(shared: Path) -> None:
    """Six workers, six shards: one of them has two pictures, the others four."""
    order = order_of(shared, batch_size=6, workers=6)
    steps = order.steps_per_epoch
    assert steps == 3
    seen = [[batch[0] for batch in ids(lessons(order, steps, 0, rank))] for rank in range(6)]
    assert sorted(len(set(part)) for part in seen) == [2, 3, 3, 3, 3, 3]


# What cannot be read


def poison(store: Path, shard: int, row: int) -> None:
    """Make one embedding of the store not finite; checksums are right."""
    path = store / "embeddings" / f"part-{shard:05d}.parquet"
    table = pq.read_table(path)
    footer = {"everymask": pq.read_metadata(path).metadata[b"everymask"]}
    column = table["embedding"].combine_chunks()
    tensors = column.to_numpy_ndarray().copy()
    tensors[row, 0, 0, 0] = np.nan
    index = table.schema.get_field_index("embedding")
    changed = type(column).from_numpy_ndarray(tensors).cast(column.type)
    table = table.set_column(index, table.schema.field(index), changed)
    pq.write_table(table.replace_schema_metadata(footer), path)


def test_what_cannot_be_read_is_left_out_counted_and_named_once(
    store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pictures = store.parent / "store-pictures"
    before = ids(lessons(order_of(store), 10))
    poison(store, 1, 2)  # image 6
    (pictures / "009.png").unlink()
    (pictures / "014.png").write_bytes((pictures / "014.png").read_bytes()[:-20])
    Image.new("RGB", (40, 40)).save(pictures / "020.bmp")
    (pictures / "020.bmp").rename(pictures / "020.png")
    lost = {6, 9, 14, 20}
    reader = LessonReader(order_of(store), 0, read_ahead=3)
    with caplog.at_level(logging.WARNING, "everymask"), closing(reader.batches(0)) as batches:
        after = ids(list(islice(batches, 10)))
    assert reader.skipped.images == 4
    for image_id in (9, 14, 20):
        assert len(re.findall(rf"image {image_id} skipped, \w+: .*{image_id:03d}\.png", caplog.text)) == 1
    assert caplog.text.count("1 images of shard 1 skipped (6): its embedding is not finite") == 1
    assert len(caplog.records) == 4
    assert all(len(batch) == 4 and not set(batch) & lost for batch in after)
    for a, b in zip(before, after, strict=True):
        assert [image_id for image_id in a if image_id not in lost] == b[: len(set(a) - lost)]
    assert ids(lessons(order_of(store), 4, 3)) == after[3:7]


def test_a_picture_of_another_size_is_not_the_teachers(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    picture = store.parent / "store-pictures" / "000.png"
    size = picture.stat().st_size
    buffer = io.BytesIO()
    Image.new("RGB", (48, 48)).save(buffer, "PNG")
    picture.write_bytes(buffer.getvalue() + bytes(size - len(buffer.getvalue())))
    batches = lessons(order_of(store, batch_size=2), 22)
    assert 0 not in {image_id for batch in ids(batches) for image_id in batch}
    assert "(48, 48) pixels, the teacher saw (96, 96)" in caplog.text


def test_where_nothing_can_be_read_the_training_ends(store: Path, tmp_path: Path) -> None:
    (store.parent / "store-pictures").rename(store.parent / "elsewhere")
    with pytest.raises(TrainingDataError, match=r"100 pictures failed one after another, lastly: .*\.png"):
        lessons(order_of(store), 1)
    (store.parent / "elsewhere").rename(store.parent / "store-pictures")
    for shard in range(6):
        path = store / "embeddings" / f"part-{shard:05d}.parquet"
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(TrainingDataError, match=r"There is no picture in .*store to learn from"):
        lessons(order_of(store), 1)
    order = order_of(store)
    (store / "embeddings" / "part-00002.parquet").unlink()
    with pytest.raises(StorageError, match="part-00002"):
        lessons(order, 1)


# The training


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
    for target in (output, whole):
        done = subprocess.run(
            without_ray("jobs.distill", *flags, "--output", target),
            check=False,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        assert done.returncode == 0, done.stderr
        assert ("going on: step" in done.stderr) == (target == output)
    assert "22 images in 6 shards; 8 steps of 4" in done.stderr
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


@pytest.mark.alone
def test_two_workers_by_ray_train_do_what_one_would(shared: Path, tmp_path: Path) -> None:
    output = tmp_path / "ray.safetensors"
    flags = ["--store", shared, "--output", output, "--device", "cpu", "--precision", "fp32", "--batch-size", "4"]
    flags += ["--steps", "3", "--warmup-steps", "4", "--ema-decay", "0", "--num-workers", "2"]
    # Ray Train starts some ten processes, which takes minutes on a machine that has other work too.
    done = subprocess.run(
        command("jobs.distill", *flags), check=False, capture_output=True, text=True, timeout=2.5 * TIMEOUT_S
    )
    assert done.returncode == 0, done.stderr
    assert "step 3, 100.0 %" in done.stderr

    config = config_for(shared, output, steps=3, num_workers=2)
    made = plan(config)
    optimizer = OptimizerConfig(steps=3, warmup_steps=4, precision="fp32", ema_decay=0)
    training = Training(BothShares(Distillation(made.model)), made.model, optimizer)
    shares = [lessons(made.order, 3, rank=rank) for rank in range(2)]
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
    assert math.isclose(
        state_of(output)["position"]["losses"]["loss"], training.position.losses["loss"], rel_tol=1e-4
    )


def ray_flags(store: Path, output: Path, steps: int) -> list[str | Path]:
    flags: list[str | Path] = ["--store", store, "--output", output, "--device", "cpu", "--precision", "fp32"]
    return [
        *flags,
        "--batch-size",
        "4",
        "--steps",
        str(steps),
        "--num-workers",
        "2",
        "--checkpoint-minutes",
        "1e-9",
    ]


def train_workers(driver: int) -> list[int]:
    """Process ids of the workers of a command's Ray Train."""
    children: dict[int, list[int]] = {}
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parent = int(path.joinpath("stat").read_text().rsplit(")", 1)[1].split()[1])
            children.setdefault(parent, []).append(int(path.name))
            if path.joinpath("cmdline").read_bytes().startswith(b"ray::RayTrainWorker"):
                found.append(int(path.name))
    below, waiting = set(), [driver]
    while waiting:
        below.update(more := children.get(waiting.pop(), []))
        waiting += more
    return [worker for worker in found if worker in below]


@pytest.mark.alone
def test_after_a_worker_is_lost_all_go_on_from_the_last_checkpoint(shared: Path, tmp_path: Path) -> None:
    output, log = tmp_path / "ray.safetensors", tmp_path / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(command("jobs.distill", *ray_flags(shared, output, 8)), stderr=stream)
    deadline = time.monotonic() + 2.5 * TIMEOUT_S
    while not Path(f"{output}.training").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    workers = train_workers(process.pid)
    assert len(workers) == 2, log.read_text()
    os.kill(max(workers), signal.SIGKILL)
    assert process.wait(2.5 * TIMEOUT_S) == 0, log.read_text()
    text = log.read_text()
    assert "workers failed, starting them anew" in text
    begun = re.search(r"going on: step (\d+),", text)
    assert begun
    assert 1 <= int(begun[1]) < 8
    assert state_of(output)["position"]["step"] == 8
    assert load_model(str(output), "cpu").image_size == SIZE


@pytest.mark.alone
def test_what_a_worker_raises_is_the_commands_exit_code(shared: Path, tmp_path: Path) -> None:
    output = tmp_path / "ray.safetensors"
    hopeless = ["--learning-rate", "1e30", "--warmup-steps", "0", "--clip", "0"]
    done = subprocess.run(
        command("jobs.distill", *ray_flags(shared, output, 4), *hopeless),
        check=False,
        capture_output=True,
        text=True,
        timeout=2.5 * TIMEOUT_S,
    )
    assert done.returncode == 5, done.stderr
    [message] = [line for line in done.stderr.splitlines() if line.split(" ", 2)[-1].startswith("Diverged: ")]
    assert len(re.findall(r"image \d+", message)) == 4  # of both workers
    assert "starting them anew" not in done.stderr
    assert not output.exists()
    assert state_of(output)["position"]["step"] == 1
