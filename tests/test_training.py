"""SAM's own training: examples, prompts, losses, the loop, and the command."""

import math
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from bsds_folder import write_bsds
from running import command, make_dataset, run, write_jpegs
from seeded import reference_sam
from segment_anything.modeling import MaskDecoder
from torch import nn
from torch.nn import functional as F

from pipeline.config import AmgConfig, MasksConfig, ModelConfig
from pipeline.errors import Diverged, TrainingDataError
from pipeline.model import load_model
from pipeline.model.weights import read_checkpoint, seeded_model
from pipeline.training import bsds
from pipeline.training.config import OptimizerConfig
from pipeline.training.coupled import (
    Coupled,
    Prompts,
    decode,
    dice_loss,
    focal_loss,
    mask_losses,
    normalised,
)
from pipeline.training.examples import Batch, Batches, Example, augmented, bsds_source, mixed, scene_source
from pipeline.training.grouping import Grouping
from pipeline.training.loop import Checkpoints, Training, schedule
from pipeline.training.masks import masks_source

FEW = {"image_size": 64, "pictures": 2, "prompts": 3, "seed": 1}


def batches(first: int = 0, **changed: int) -> Iterator[Batch]:
    made = Batches(scene_source(64, 0), **FEW | changed)
    while True:
        yield made[first]
        first += 1


# Examples


def test_a_batch_follows_from_its_number() -> None:
    one, again = Batches(scene_source(64, 0), **FEW), Batches(scene_source(64, 0), **FEW)
    for a, b in zip(vars(one[7]).values(), vars(again[7]).values(), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert not torch.equal(one[7].pixels_B3SS, one[8].pixels_B3SS)


def test_prompts_are_on_their_targets() -> None:
    for number in range(20):
        batch = Batches(scene_source(64, 0), **FEW | {"prompts": 8})[number]
        assert batch.pixels_B3SS.shape == (2, 3, 64, 64)
        assert batch.masks_BNss.shape[2:] == (16, 16)
        for picture in range(2):
            for target, (x, y), (left, top, right, bottom) in zip(
                batch.targets_BP[picture],
                batch.points_BP2[picture].tolist(),
                batch.boxes_BP4[picture].tolist(),
                strict=True,
            ):
                mask = batch.masks_BNss[picture, target]
                assert mask[int(y) // 4, int(x) // 4] > 0
                rows, columns = (4 * (mask > 0)).nonzero().T
                width, height = 4 * (columns.max() - columns.min() + 1), 4 * (rows.max() - rows.min() + 1)
                assert 0 <= left < right <= 64
                assert 0 <= top < bottom <= 64
                assert abs(left - 4 * columns.min()) <= 0.2 * width + 4
                assert abs(bottom - 4 * (rows.max() + 1)) <= 0.2 * height + 4


def test_pixels_and_masks_are_cut_and_mirrored_alike() -> None:
    rgb = np.full((90, 120, 3), 60, np.uint8)
    masks = np.zeros((2, 90, 120), bool)
    masks[0, 20:70, 10:50] = True
    masks[1, 5:60, 70:118] = True
    rgb[masks[0]], rgb[masks[1]] = (250, 30, 30), (30, 30, 250)
    rng = np.random.default_rng(0)
    seen = 0
    for _ in range(40):
        made = augmented(Example("two boxes", rgb, masks), 64, rng)
        assert made.rgb_HW3.shape == (64, 64, 3)
        red, _, blue = made.rgb_HW3.astype(int).transpose(2, 0, 1)
        if (red == blue)[made.masks_NHW.any(axis=0)].all():  # turned gray
            continue
        coloured = np.stack([red > blue + 90, blue > red + 90])
        for mask in made.masks_NHW[made.masks_NHW.sum(axis=(1, 2)) > 200]:
            overlap = [(mask & colour).sum() / (mask | colour).sum() for colour in coloured]
            assert max(overlap) > 0.85
            seen += 1
    assert seen > 40


def test_the_segments_of_all_annotators_are_drawn(tmp_path: Path) -> None:
    rgb = np.zeros((40, 60, 3), np.uint8)
    left, top = np.ones((40, 60), np.uint16), np.ones((40, 60), np.uint16)
    left[:, 30:] = 2
    top[10:] = 7
    folder = write_bsds(tmp_path / "bsds", {"a": (rgb, [left, top])}, "train")
    [photograph] = [bsds.read_photograph(path) for path in bsds.photographs(folder, "train")]
    masks = bsds_source([photograph])(np.random.default_rng(0)).masks_NHW
    assert sorted(masks.sum(axis=(1, 2)).tolist()) == [600, 1200, 1200, 1800]
    assert bsds.segments(top, smallest=0.3).sum() == 1800
    with pytest.raises(TrainingDataError, match="no BSDS500"):
        bsds.photographs(folder, "val")


def test_sources_are_mixed_by_their_shares() -> None:
    def named(name: str) -> Example:
        return Example(name, np.zeros((8, 8, 3), np.uint8), np.ones((1, 8, 8), bool))

    source = mixed([lambda _: named("a"), lambda _: named("b")], [1, 3])
    rng = np.random.default_rng(0)
    assert 650 < sum(source(rng).name == "b" for _ in range(1000)) < 850


def test_a_masks_dataset_gives_its_images_and_masks(tmp_path: Path, tiny_checkpoint: Path) -> None:
    images = write_jpegs(tmp_path / "images", 5)
    (images / "0002.jpg").write_bytes(b"no image")
    config = MasksConfig(
        images=str(images),
        output=str(tmp_path / "out"),
        images_per_shard=2,
        amg=AmgConfig(points_per_side=2, pred_iou_thresh=-10, stability_score_thresh=0, box_nms_thresh=1),
        model=ModelConfig(checkpoint=str(tiny_checkpoint)),
    )
    make_dataset(config, tiny_checkpoint)
    source = masks_source(config.output)
    rng = np.random.default_rng(0)
    drawn = {example.name: example for example in (source(rng) for _ in range(60))}
    assert {Path(name).name for name in drawn} == {f"000{i}.jpg" for i in (0, 1, 3, 4)}
    for example in drawn.values():
        assert example.rgb_HW3.shape == (96, 128, 3)
        assert example.masks_NHW.shape == (12, 96, 128)
        assert example.masks_NHW.dtype == bool
    with pytest.raises(TrainingDataError, match="no finished shard"):
        (tmp_path / "empty").mkdir()
        for name in ("run.json",):
            (tmp_path / "empty" / name).write_bytes((tmp_path / "out" / name).read_bytes())
        masks_source(str(tmp_path / "empty"))


# Decoder and losses


@pytest.mark.parametrize("kind", ["click", "two clicks", "box", "box and mask"])
def test_decode_answers_as_the_reference_decoder(kind: str) -> None:
    torch.manual_seed(0)
    model = seeded_model(0, 64)
    features = torch.randn(2, 256, 4, 4)
    points = torch.rand(2, 3, {"click": 1, "two clicks": 2}.get(kind, 0), 2) * 64
    boxes = torch.tensor([4.0, 8, 40, 50]).expand(2, 3, 4) if "box" in kind else None
    logits = torch.randn(2, 3, 16, 16) if "mask" in kind else None
    labels = torch.tensor([1, 0])[: points.shape[2]].expand(2, 3, -1)
    masks, iou = decode(model, features, Prompts(points, labels, boxes, logits))
    decoder: MaskDecoder = model.mask_decoder
    for picture in range(2):
        sparse, dense = model.prompt_encoder(
            points=(points[picture], labels[picture]) if points.shape[2] else None,
            boxes=None if boxes is None else boxes[picture],
            masks=None if logits is None else logits[picture][:, None],
        )
        expected, expected_iou = decoder(
            features[picture : picture + 1],
            model.prompt_encoder.get_dense_pe(),
            sparse,
            dense,
            multimask_output=kind == "click",
        )
        assert masks[picture].shape == expected.shape
        torch.testing.assert_close(masks[picture], expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(iou[picture], expected_iou, atol=1e-5, rtol=1e-4)


def test_losses_by_hand() -> None:
    logits = torch.tensor([[0.0, 2.0], [-1.0, 5.0]])
    target = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    p = logits.sigmoid()
    right = torch.where(target > 0, p, 1 - p)
    assert focal_loss(logits, target) == pytest.approx(float(((1 - right) ** 2 * -right.log()).mean()), abs=1e-6)
    dice = 1 - (2 * float(p[0].sum()) + 1) / (float(p.sum()) + 2 + 1)
    assert dice_loss(logits, target) == pytest.approx(dice, abs=1e-6)


def one_square(mask: torch.Tensor, other: torch.Tensor | None = None) -> Batch:
    masks = torch.stack([mask, other if other is not None else torch.zeros_like(mask)]).to(torch.uint8) * 255
    return Batch(
        ("square",),
        torch.zeros(1, 3, 64, 64, dtype=torch.uint8),
        masks[None],
        torch.tensor([[0]]),
        torch.tensor([[[30.0, 30.0]]]),
        torch.tensor([[[16.0, 16.0, 48.0, 48.0]]]),
    )


def test_only_the_best_of_three_masks_is_corrected() -> None:
    inside = torch.zeros(16, 16)
    inside[4:12, 4:12] = 1
    shift = torch.tensor([0.0, 4.0, 8.0])
    logits = torch.stack([(torch.roll(inside, int(s), 1) - 0.5) * 4 for s in shift])[None, None].requires_grad_()
    iou = torch.zeros(1, 1, 3, requires_grad=True)
    losses = mask_losses(logits, iou, one_square(inside))
    losses["loss"].backward()
    assert logits.grad is not None
    assert logits.grad[0, 0, 0].abs().sum() > 0
    assert logits.grad[0, 0, 1:].abs().sum() == 0
    assert losses["miou"] == 1
    # The IoU head learns all three: 1, a third, none.
    assert losses["iou"] == pytest.approx((1 + 1 / 9 + 0) / 3, abs=1e-6)


def test_a_mask_of_a_part_is_worth_its_iou_with_the_part() -> None:
    whole, part = torch.zeros(16, 16), torch.zeros(16, 16)
    whole[2:14, 2:14], part[6:10, 6:10] = 1, 1
    logits = torch.stack([part, whole, torch.roll(whole, 16, 0)])[None, None] * 4 - 2
    losses = mask_losses(logits, torch.ones(1, 1, 3), one_square(whole, part))
    assert losses["iou"] == 0
    elsewhere = torch.zeros(16, 16)
    elsewhere[0:2, 0:2] = 1  # not under the click
    logits[0, 0, 0] = elsewhere * 4 - 2
    losses = mask_losses(logits, torch.ones(1, 1, 3), one_square(whole, elsewhere))
    assert losses["iou"] == pytest.approx(1 / 3)


def test_corrective_clicks_are_where_the_mask_is_wrong() -> None:
    target = torch.zeros(16, 16)
    target[4:12, 4:12] = 1
    batch = one_square(target)
    missing, spilt = target.clone(), target.clone()
    missing[4:12, 8:12] = 0
    spilt[4:12, 12:16] = 1
    for drawn, label, columns in ((missing, 1, (32, 48)), (spilt, 0, (48, 64))):
        prompts = Prompts.first(batch, "point").corrected(drawn[None, None, None] * 4 - 2, batch)
        assert prompts.points_BPK2.shape == (1, 1, 2, 2)
        assert prompts.labels_BPK[0, 0].tolist() == [1, label]
        x, y = prompts.points_BPK2[0, 0, 1].tolist()
        assert columns[0] <= x < columns[1]
        assert 16 <= y < 48
        assert prompts.logits_BPss is not None
        assert not prompts.ambiguous


# The loop


def training(config: OptimizerConfig, **arguments: float) -> Training:
    torch.manual_seed(3)
    model = seeded_model(3, 64)
    return Training(Coupled(model, **arguments), model, config)  # type: ignore[arg-type]


def steps(count: int, **changed: object) -> OptimizerConfig:
    return OptimizerConfig(
        **{"steps": count, "warmup_steps": 2, "learning_rate": 1e-3, "precision": "fp32"} | changed  # type: ignore[arg-type]
    )


def test_training_learns_one_batch() -> None:
    [batch] = [Batches(scene_source(64, 0), **FEW)[0]]
    untrained = training(steps(40))
    history = []
    untrained.run(iter([batch] * 40), 1, lambda t: history.append(dict(t.position.losses)))
    model = untrained.model.eval()
    with torch.no_grad():
        losses = Coupled(model)(batch, 0)  # type: ignore[arg-type]
    assert losses["loss"] < 0.5 * history[0]["loss"]
    assert losses["miou"] > history[0]["miou"] + 0.2


def test_every_part_of_the_model_is_trained() -> None:
    begun = training(steps(4), box_share=0.5, corrective_clicks=1)
    before = {name: value.clone() for name, value in begun.model.named_parameters()}
    reached: set[str] = set()

    def note(step: Training) -> None:
        reached.update(name for name, value in step.model.named_parameters() if value.grad is not None)

    begun.run(batches(), 1, note)
    assert reached == before.keys()
    same = {name for name, value in begun.model.named_parameters() if torch.equal(value, before[name])}
    # Of the three masks of a click only the best is corrected, in so few steps perhaps always the same one.
    heads = {name.split(".")[2] for name in same}
    assert all(name.startswith("mask_decoder.output_hypernetworks_mlps.") for name in same)
    assert heads < {"1", "2", "3"}


ALONE = {"grouping": 0.5, "grouping_alone": 2}


def test_grouping_comes_first_alone_and_then_along() -> None:
    begun = training(steps(4), **ALONE)
    before = {name: value.clone() for name, value in begun.objective.named_parameters()}
    seen: list[set[str]] = []
    changed: list[set[str]] = []

    def note(step: Training) -> None:
        seen.append(set(step.position.losses))
        now = dict(step.objective.named_parameters())
        changed.append({name for name, value in now.items() if not torch.equal(value, before[name])})

    begun.run(batches(), 1, note)
    alone, together = {"loss", "grouping", "grouping_miou"}, {"focal", "dice", "iou", "miou"}
    assert seen == [alone, alone, alone | together, alone | together]
    parts = ("model.image_encoder.", "model.mask_decoder.output_upscaling.", "grouping.head.")
    assert all(name.startswith(parts) for name in changed[1])
    assert all(any(name.startswith(part) for name in changed[1]) for part in parts)
    assert any(name.startswith("model.mask_decoder.transformer.") for name in changed[2])
    assert begun.average.keys() == begun.model.state_dict().keys()  # the head stays out of what is exported


def test_grouping_weighs_what_it_says() -> None:
    batch = Batches(scene_source(64, 0), **FEW)[0]
    model = seeded_model(3, 64)
    with torch.no_grad():
        alone = Coupled(model)(batch, 0)
        together = Coupled(model, grouping=0.5)(batch, 0)
    torch.testing.assert_close(together["loss"], alone["loss"] + 0.5 * together["grouping"])


def test_features_that_tell_segments_apart_are_grouped() -> None:
    """A head learns to read features that are the segments' own; of noise it learns less."""
    left = torch.zeros(1, 2, 8, 8, dtype=torch.uint8)
    left[:, 0, :, :4] = 255
    left[:, 1, :, 4:] = 255
    nothing = torch.zeros(1, 1)
    batch = Batch(("halves",), nothing, left, nothing.long(), nothing, nothing)
    told = F.pad(left.float() / 64, (0, 0, 0, 0, 0, 30))
    noise = torch.randn(told.shape, generator=torch.Generator().manual_seed(0))
    results = {}
    for name, features in {"told": told, "noise": noise}.items():
        torch.manual_seed(0)
        grouping = Grouping(anchors=32)
        optimizer = torch.optim.Adam(grouping.parameters(), 3e-3)
        for number in range(150):
            optimizer.zero_grad()
            # Noise is new each time, so that it cannot be learnt by heart.
            losses = grouping(features if name == "told" else noise.roll((number,) * 3, (1, 2, 3)), batch, number)
            losses["grouping"].backward()
            optimizer.step()
        results[name] = losses
    assert results["told"]["grouping_miou"] > 0.99
    assert results["told"]["grouping"] < 0.1
    assert results["noise"]["grouping_miou"] < 0.95
    assert results["noise"]["grouping"] > 0.3


def test_pixels_of_no_mask_are_not_asked_about() -> None:
    nothing = torch.zeros(1, 1)
    batch = Batch(("none",), nothing, torch.zeros(1, 2, 8, 8, dtype=torch.uint8), nothing.long(), nothing, nothing)
    losses = Grouping()(torch.randn(1, 32, 8, 8), batch, 0)
    assert losses["grouping"] == 0


def test_muon_takes_the_matrices_of_linear_layers() -> None:
    begun = training(steps(3, optimizer="muon"), **ALONE)
    muon, adamw = begun.optimizers
    taken = [{id(p) for group in one.param_groups for p in group["params"]} for one in (muon, adamw)]
    names = {id(p): name for name, p in begun.objective.named_parameters()}
    assert not taken[0] & taken[1]
    assert taken[0] | taken[1] == names.keys()
    assert {"model.image_encoder.stages.1.blocks.0.attn.qkv.weight", "grouping.head.0.weight"} <= {
        names[i] for i in taken[0]
    }
    assert not any("attention_biases" in names[i] or "embed" in names[i] for i in taken[0])
    before = {name: p.clone() for name, p in begun.objective.named_parameters() if id(p) in taken[0]}
    begun.run(batches(), 1)
    still = {
        name for name, p in begun.objective.named_parameters() if name in before and torch.equal(p, before[name])
    }
    assert not {name for name in still if "hypernetworks" not in name}


@pytest.mark.parametrize("changed", [{}, {"optimizer": "muon"}])
def test_a_resumed_training_is_the_undisturbed_one(tmp_path: Path, changed: dict[str, str]) -> None:
    whole = training(steps(6, **changed), **ALONE)
    losses: list[float] = []
    whole.run(batches(), 1, lambda t: losses.append(t.position.losses["loss"]))
    uri = str(tmp_path / "x.training")
    first = training(steps(6, **changed), **ALONE)
    first.run(batches(), 0.5)
    Checkpoints(uri, 1, {"seed": 1}).write(first)
    second = training(steps(6, **changed), **ALONE)
    checkpoints = Checkpoints(uri, 1, {"seed": 1})
    assert checkpoints.resume(second)
    assert second.position == first.position
    resumed: list[float] = []
    second.run(batches(3), 1, lambda t: resumed.append(t.position.losses["loss"]))
    assert resumed == pytest.approx(losses[3:], abs=1e-5)
    for name, value in whole.average.items():
        torch.testing.assert_close(second.average[name], value, atol=1e-5, rtol=1e-4)
    with pytest.raises(TrainingDataError, match=r"seed \(1 there, 2 here\)"):
        Checkpoints(uri, 1, {"seed": 2}).resume(second)
    assert not Checkpoints(str(tmp_path / "none"), 1, {}).resume(second)


class Exploding(nn.Module):
    """Whose third loss is no number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))

    def forward(self, _batch: Batch, number: int) -> dict[str, torch.Tensor]:
        return {"loss": self.weight.sum() * (math.nan if number == 2 else 1)}


def test_a_loss_that_is_no_number_ends_the_training() -> None:
    model = Exploding()
    begun = Training(model, model, steps(10))
    named = Batches(scene_source(64, 5), **FEW)
    with pytest.raises(Diverged, match="step 2") as caught:
        begun.run((named[number] for number in range(10)), 1)
    assert all(name in str(caught.value) for name in named[2].names)
    assert begun.position.step == 2
    assert model.weight.isfinite().all()
    assert caught.value.exit_code == 5


def test_the_average_follows_the_weights() -> None:
    model = Exploding()
    begun = Training(model, model, steps(2, ema_decay=0.5, learning_rate=0.1, weight_decay=0, warmup_steps=0))
    seen = [model.weight.detach().clone()]
    begun.run(batches(), 1, lambda _: seen.append(model.weight.detach().clone()))
    after_one = seen[0] * (2 / 11) + seen[1] * (9 / 11)
    assert torch.allclose(begun.average["weight"], after_one * (3 / 12) + seen[2] * (9 / 12))


def test_the_learning_rate_rises_and_falls() -> None:
    config = steps(100, warmup_steps=10, final_rate=0.1)
    assert schedule(0, 0, config) == pytest.approx(0.1)
    assert schedule(9, 0, config) == pytest.approx(1)
    assert schedule(50, 0.5, config) == pytest.approx(0.55)
    assert schedule(99, 1, config) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="steps or minutes"):
        OptimizerConfig(steps=1, minutes=1)


# The command

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
        "--optimizer=muon",
        "--grouping=1",
        "--grouping-steps=3",
        "--loaders=0",
        "--device=cpu",
    ]


def test_killed_and_started_again_it_makes_the_same_weights(tmp_path: Path) -> None:
    """And they load here, and strictly in the original package."""
    whole, killed = tmp_path / "whole.safetensors", tmp_path / "killed.safetensors"
    assert run("jobs.train_model", *flags(whole, 12)).returncode == 0
    process = subprocess.Popen(
        command("jobs.train_model", *flags(killed, 12), "--checkpoint-minutes=0.0001"), stderr=subprocess.DEVNULL
    )
    checkpoint = tmp_path / "killed.safetensors.training"
    deadline = time.monotonic() + 200
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not killed.exists()
    other = run("jobs.train_model", *flags(killed, 12), f"--bsds={write_bsds(tmp_path / 'bsds', ONE, 'train')}")
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


def test_bad_settings_end_before_training(tmp_path: Path) -> None:
    nothing = run("jobs.train_model", f"--output={tmp_path}/x", "--steps=1")
    assert nothing.returncode == 2
    assert "nothing to train on" in nothing.stderr
    nowhere = run("jobs.train_model", f"--output={tmp_path}/x", "--steps=1", f"--bsds={tmp_path}")
    assert nowhere.returncode == 3
    assert "no BSDS500" in nowhere.stderr
    no_gpu = run("jobs.train_model", f"--output={tmp_path}/x", "--steps=1", f"--bsds={tmp_path}", "--device=cuda")
    assert (no_gpu.returncode, "no cuda device" in no_gpu.stderr) == (2, True) or torch.cuda.is_available()
    assert not list(tmp_path.iterdir())


def test_pixels_are_normalised_as_for_masks() -> None:
    model = seeded_model(0, 64)
    rgb = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    pixels = torch.from_numpy(rgb.transpose(2, 0, 1).copy())[None]
    torch.testing.assert_close(normalised(pixels), model.preprocess(rgb)[0])
