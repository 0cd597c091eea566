"""SAM's own training: examples, prompts, losses, the loop, and the command."""

import io
import json
import logging
import math
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from bsds_folder import write_bsds
from PIL import Image
from pydantic import ValidationError
from running import kill_at_first_checkpoint, make_dataset, rows, run, write_jpegs
from seeded import reference_sam
from segment_anything.modeling import MaskDecoder
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from jobs.train_model import sources, train_model
from pipeline import storage
from pipeline.amg.selfcheck import self_checking_checkpoint
from pipeline.config import AmgConfig, ImagesConfig, MasksConfig, ModelConfig
from pipeline.errors import Diverged, TrainingDataError
from pipeline.model import load_model
from pipeline.model.weights import read_checkpoint, seeded_model
from pipeline.training import bsds
from pipeline.training.config import OptimizerConfig, TrainConfig
from pipeline.training.coupled import (
    Coupled,
    Prompts,
    decode,
    dice_loss,
    focal_loss,
    mask_losses,
    normalised,
    prompt_kind,
)
from pipeline.training.examples import MASKS, Batch, Batches, Example, augmented, bsds_source, mixed, scene_source
from pipeline.training.export import export
from pipeline.training.grouping import Grouping, matmul_float32
from pipeline.training.loop import Checkpoints, Training, schedule
from pipeline.training.masks import MasksSource
from pipeline.training.scenes import HELD_OUT_SEED

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


@pytest.mark.parametrize("size", [(9, 40), (40, 9), (5, 5), (1, 300), (300, 1)])
def test_small_pictures_are_examples_too(size: tuple[int, int]) -> None:
    rgb, masks = np.full((*size, 3), 200, np.uint8), np.ones((1, *size), bool)
    rng = np.random.default_rng(0)
    for _ in range(20):
        made = augmented(Example("small", rgb, masks), 64, rng, 128)
        assert made.rgb_HW3.shape == (64, 64, 3)
        assert made.masks_NHW.shape == (1, 64, 64)


def test_masks_are_where_the_pixels_are_to_half_a_pixel() -> None:
    """Every other column: what a nearest neighbour that is off by a fraction would miss."""
    columns = np.zeros((3, 3), bool)
    columns[:, 1] = True
    rgb = np.where(columns[..., None], 255, 0).astype(np.uint8).repeat(3, axis=2)
    made = augmented(Example("columns", rgb, columns[None]), 64, np.random.default_rng(0))
    [mask] = made.masks_NHW
    taken = mask[0].nonzero()[0]
    height, width = 64, 64
    assert mask.shape == (height, width)
    assert taken.mean() == pytest.approx(31.5, abs=0.01)


def test_a_source_without_masks_is_an_error_that_names_its_last_example() -> None:
    speck = np.zeros((1, 100, 100), bool)
    speck[0, 50, 50] = True
    drawn = []

    def source(_: np.random.Generator) -> Example:
        drawn.append(f"picture {len(drawn)}")
        return Example(drawn[-1], np.zeros((100, 100, 3), np.uint8), speck)

    with pytest.raises(TrainingDataError, match=r"100 examples one after another .* of them picture 99\."):
        Batches(source, **FEW | {"image_size": 128})[0]


def masks_dataset(folder: Path, checkpoint: Path, images: int, **changed: object) -> MasksConfig:
    """Images 96 x 128 with 12 masks each in `out`, the images in `images`."""
    config = MasksConfig(
        images=str(write_jpegs(folder / "images", images)),
        output=str(folder / "out"),
        **{  # type: ignore[arg-type]
            "images_per_shard": 2,
            "amg": AmgConfig(points_per_side=2, pred_iou_thresh=-10, stability_score_thresh=0, box_nms_thresh=1),
            "model": ModelConfig(checkpoint=str(checkpoint)),
            **changed,
        },
    )
    make_dataset(config, checkpoint)
    return config


def test_a_masks_dataset_gives_its_images_and_masks(tmp_path: Path, tiny_checkpoint: Path) -> None:
    config = masks_dataset(tmp_path, tiny_checkpoint, 5)
    source = MasksSource(config.output)
    rng = np.random.default_rng(0)
    drawn = {example.name: example for example in (source(rng) for _ in range(60))}
    assert {Path(name).name for name in drawn} == {f"000{i}.jpg" for i in range(5)}
    stored = {row["uri"]: row for row in rows(config.output)}
    for name, example in drawn.items():
        [path] = [uri for uri in stored if uri.endswith(Path(name).name)]
        assert np.array_equal(example.rgb_HW3, np.array(Image.open(path.removeprefix("file://"))))
        assert example.masks_NHW.dtype == bool
        assert example.masks_NHW.shape == (12, 96, 128)
        assert example.masks_NHW.sum(axis=(1, 2)).tolist() == [mask["area"] for mask in stored[path]["masks"]]
    with pytest.raises(TrainingDataError, match="no finished shard"):
        (tmp_path / "empty").mkdir()
        for name in ("run.json",):
            (tmp_path / "empty" / name).write_bytes((tmp_path / "out" / name).read_bytes())
        MasksSource(str(tmp_path / "empty"))


def test_images_that_are_not_what_the_masks_are_of_are_counted(
    tmp_path: Path, tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = masks_dataset(tmp_path, tiny_checkpoint, 5)
    images = tmp_path / "images"
    (images / "0001.jpg").unlink()
    listed = (images / "0002.jpg").stat().st_size
    changed = io.BytesIO()
    Image.new("RGB", (96, 96)).save(changed, "JPEG")
    (images / "0002.jpg").write_bytes(changed.getvalue().ljust(listed, b"\0"))  # of the size that was listed
    source = MasksSource(config.output)
    rng = np.random.default_rng(0)
    assert {Path(source(rng).name).name for _ in range(60)} == {"0000.jpg", "0003.jpg", "0004.jpg"}
    assert source.skipped.images == 2
    assert "(96, 96) pixels, its masks have (96, 128)" in caplog.text
    assert "0001.jpg" in caplog.text
    for path in images.iterdir():
        path.unlink()
    with pytest.raises(TrainingDataError, match="give no image with masks; 5 images could not be read"):
        source(rng)


def test_a_masks_datasets_own_limits_hold(tmp_path: Path, tiny_checkpoint: Path) -> None:
    config = masks_dataset(tmp_path, tiny_checkpoint, 2)
    path = tmp_path / "out" / "run.json"
    document = json.loads(path.read_text())
    document["determinants"]["reading"]["max_pixels"] = 96 * 128 - 1
    path.write_text(json.dumps(document))
    with pytest.raises(TrainingDataError, match="2 images could not be read"):
        MasksSource(config.output)(np.random.default_rng(0))


def test_of_many_masks_as_many_are_decoded_as_an_example_has(tmp_path: Path, tiny_checkpoint: Path) -> None:
    amg = AmgConfig(points_per_side=4, pred_iou_thresh=-10, stability_score_thresh=0, box_nms_thresh=1)
    config = masks_dataset(tmp_path, tiny_checkpoint, 1, amg=amg)
    [row] = rows(config.output)
    assert len(row["masks"]) > MASKS
    areas = [mask["area"] for mask in row["masks"]]
    source, rng = MasksSource(config.output), np.random.default_rng(0)
    one, other = source(rng).masks_NHW, source(rng).masks_NHW
    assert len(one) == len(other) == MASKS
    assert set(one.sum(axis=(1, 2)).tolist()) <= set(areas)
    assert not np.array_equal(one, other)


def test_row_groups_are_read_once(tmp_path: Path, tiny_checkpoint: Path) -> None:
    config = masks_dataset(tmp_path, tiny_checkpoint, 3, images_per_shard=3)
    path = tmp_path / "out" / "masks" / "part-00000.parquet"
    pq.write_table(pq.read_table(path), path, row_group_size=2)
    source, rng = MasksSource(config.output), np.random.default_rng(0)
    expected = [source(np.random.default_rng(i)).name for i in range(30)]
    path.unlink()
    assert [source(np.random.default_rng(i)).name for i in range(30)] == expected
    assert len(set(expected)) == 3
    path.write_bytes(b"nothing")
    with pytest.raises(TrainingDataError, match=r"part-00000\.parquet is damaged"):
        MasksSource(config.output)(rng)


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


def test_what_leaves_no_ambiguity_is_worth_its_iou_with_what_was_asked_for() -> None:
    whole, part = torch.zeros(16, 16), torch.zeros(16, 16)
    whole[2:14, 2:14], part[6:10, 6:10] = 1, 1
    drawn = (part * 4 - 2)[None, None, None]  # one mask, as for a box and for several clicks
    losses = mask_losses(drawn, torch.zeros(1, 1, 1), one_square(whole, part))
    assert losses["iou"] == pytest.approx((16 / 144) ** 2)


def test_pixels_are_counted_exactly_under_autocast() -> None:
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.rand(1, 3, 64 * 64, generator=rng) < 0.9 for _ in range(2))
    exact = (a[:, :, None] & b[:, None]).sum(-1).float()
    masks = (torch.rand(1, 2, 64, 64, generator=rng) < 0.9).to(torch.uint8) * 255
    batch = replace(one_square(torch.zeros(16, 16)), masks_BNss=masks)
    logits = torch.randn(1, 1, 3, 64, 64, generator=rng)
    head, features = Grouping(), torch.zeros(1, 32, 64, 64)
    nn.init.zeros_(head.head[2].weight)
    head.head[2].bias.data[-2:] = torch.tensor([1.0, -30.0])  # everything belongs together, in any precision
    plain = mask_losses(logits, torch.zeros(1, 1, 3), batch), head(features, batch, 0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(matmul_float32(a, b.transpose(1, 2).float()), exact)
        assert not torch.equal((a.float() @ b.transpose(1, 2).float()).float(), exact)
        rounded = mask_losses(logits, torch.zeros(1, 1, 3), batch), head(features, batch, 0)
    assert rounded[0]["iou"] == plain[0]["iou"]
    assert rounded[1]["grouping_miou"] == plain[1]["grouping_miou"]


@pytest.mark.parametrize("share", [0, 0.1, 0.3, 0.4, 0.5])
def test_boxes_have_their_share_of_the_batches(share: float) -> None:
    kinds = [prompt_kind(number, share) for number in range(1000)]
    assert kinds.count("box") == 1000 * share
    assert abs(kinds[:100].count("box") - 100 * share) <= 1


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


def test_training_in_bfloat16_learns_and_keeps_float32_weights() -> None:
    [batch] = [Batches(scene_source(64, 0), **FEW)[0]]
    begun = training(OptimizerConfig(steps=40, warmup_steps=2, learning_rate=1e-3), grouping=0.2)
    assert begun.config.precision == "bf16"
    history = []
    begun.run(iter([batch] * 40), 1, lambda t: history.append(dict(t.position.losses)))
    assert {p.dtype for p in begun.objective.parameters()} == {torch.float32}
    with torch.no_grad():
        losses = Coupled(begun.model.eval())(batch, 0)  # type: ignore[arg-type]
    assert losses["loss"] < 0.6 * history[0]["loss"]
    assert losses["miou"] > history[0]["miou"] + 0.15


def test_weights_decay_but_not_biases_norms_and_embeddings() -> None:
    begun = training(steps(1, weight_decay=0.07), **ALONE)
    [adamw] = begun.optimizers
    decays = {id(p): group["weight_decay"] for group in adamw.param_groups for p in group["params"]}
    expected = {}
    for path, module in begun.objective.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            weight = isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)) and name == "weight"
            expected[f"{path}.{name}"] = 0.07 if weight else 0
    named = dict(begun.objective.named_parameters())
    assert {name: decays[id(parameter)] for name, parameter in named.items()} == expected
    kept = {name.rsplit(".", 1)[1] for name, decay in expected.items() if not decay}
    assert kept == {"weight", "bias", "attention_biases"}
    assert expected["model.mask_decoder.mask_tokens.weight"] == 0


def test_gradients_are_clipped() -> None:
    norms = {}
    for clip in (0, 1e-3):
        begun = training(steps(1, clip=clip))
        begun.run(batches(), 1)
        gradients = [p.grad for p in begun.objective.parameters() if p.grad is not None]
        norms[clip] = float(nn.utils.get_total_norm(gradients))
    assert norms[0] > 0.1
    assert norms[1e-3] == pytest.approx(1e-3, rel=1e-3)


ALONE = {"grouping": 0.5, "grouping_alone": 2}


def test_grouping_asks_about_the_seeds_pixels() -> None:
    batch = Batches(scene_source(64, 0), **FEW)[0]
    grouping, other = Grouping(seed=1), Grouping(seed=2)
    other.load_state_dict(grouping.state_dict())
    features = torch.randn(2, 32, 16, 16)
    with torch.no_grad():
        losses = [float(one(features, batch, n)["grouping"]) for one in (grouping, other) for n in (0, 1, 0)]
    assert losses[0] == losses[2]
    assert len(set(losses)) == 4


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


def test_a_checkpoint_goes_on_with_another_number_of_workers(tmp_path: Path) -> None:
    """What averages gradients over workers is no part of it."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/workers", rank=0, world_size=1)
    try:
        torch.manual_seed(3)
        model = seeded_model(3, 64)
        parallel = DistributedDataParallel(Coupled(model), find_unused_parameters=True)
        several = Training(parallel, model, steps(6))
        several.run(batches(), 0.5)
        kept = several.checkpoint({})
        alone = training(steps(6))
        alone.restore(kept, {})
        alone.run(batches(3), 1)
        several.restore(alone.checkpoint({}), {})
    finally:
        distributed.destroy_process_group()
    undisturbed = training(steps(6))
    undisturbed.run(batches(), 1)
    assert several.position.step == 6
    for name, value in undisturbed.model.state_dict().items():
        torch.testing.assert_close(several.model.state_dict()[name], value, atol=1e-5, rtol=1e-4)


OWN = {"pred_iou_thresh": 0.6, "stability_score_thresh": 0.75}


def test_the_export_has_the_thresholds_of_the_weights_it_began_from(tmp_path: Path) -> None:
    model = seeded_model(0, 64)
    model.thresholds = OWN
    path = tmp_path / "begun.safetensors"
    path.write_bytes(self_checking_checkpoint(model))
    begun = load_model(str(path), "cpu")
    exported = tmp_path / "exported.safetensors"
    exported.write_bytes(export(Training(Coupled(begun), begun, steps(1)), 64))
    assert load_model(str(exported), "cpu").thresholds == OWN


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
    kill_at_first_checkpoint(killed, "jobs.train_model", *flags(killed, 12), "--checkpoint-minutes=0.0001")
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
        *("--stages=64:3:1", "--steps=4", "--prompts=2", "--warmup-steps=0", "--device=cpu"),
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
        refused = run("jobs.train_model", f"--output={tmp_path}/x", "--steps=1", "--scenes=1", flag)
        assert refused.returncode == 2, refused.stderr
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
