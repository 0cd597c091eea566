"""SAM's own objective: prompts, decoder, losses."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from segment_anything.modeling import MaskDecoder
from torch import nn

from pipeline.model.weights import seeded_model
from pipeline.training.coupled import (
    Prompts,
    decode,
    mask_losses,
    normalised,
    pairwise_losses,
    prompt_kind,
)
from pipeline.training.examples import Batch
from pipeline.training.grouping import Grouping, matmul_float32


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
    other = torch.tensor([[0.0, 0.25], [1.0, 0.0]])
    focal, dice = pairwise_losses(logits[None, None, None], torch.stack([target, other])[None])
    assert focal.shape == dice.shape == (1, 1, 1, 2)
    p = logits.sigmoid()
    on, off = (1 - p) ** 2 * -p.log(), p**2 * -(1 - p).log()
    for i, mask in enumerate((target, other)):
        assert focal[0, 0, 0, i] == pytest.approx(float((mask * on + (1 - mask) * off).mean()), abs=1e-6)
        overlap = 2 * float((p * mask).sum()) + 1
        assert dice[0, 0, 0, i] == pytest.approx(1 - overlap / float(p.sum() + mask.sum() + 1), abs=1e-6)


def test_pairs_are_of_the_same_picture() -> None:
    torch.manual_seed(0)
    logits, masks = torch.randn(2, 3, 3, 8, 8), torch.rand(2, 5, 8, 8)
    together = pairwise_losses(logits, masks)
    for b, p, m, n in ((0, 2, 1, 4), (1, 0, 2, 3)):
        alone = pairwise_losses(logits[b : b + 1, p : p + 1, m : m + 1], masks[b : b + 1, n : n + 1])
        for one, all_pairs in zip(alone, together, strict=True):
            torch.testing.assert_close(one[0, 0, 0, 0], all_pairs[b, p, m, n])


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


def test_each_mask_under_the_click_corrects_the_nearest_of_three() -> None:
    whole, part, elsewhere = torch.zeros(3, 16, 16)
    whole[2:14, 2:14], part[6:10, 6:10], elsewhere[0:2] = 1, 1, 1
    drawn = torch.stack([torch.roll(elsewhere, 1, 0), torch.roll(part, 1, 0), torch.roll(whole, 1, 0)])
    iou = torch.zeros(1, 1, 3)

    def corrected(other: torch.Tensor) -> list[bool]:
        logits = ((drawn - 0.5) * 4)[None, None].requires_grad_()
        mask_losses(logits, iou, one_square(whole, other))["loss"].backward()
        assert logits.grad is not None
        return [bool(gradient.abs().sum() > 0) for gradient in logits.grad[0, 0]]

    assert corrected(elsewhere) == [False, False, True]
    assert corrected(part) == [False, True, True]
    both = mask_losses(((drawn - 0.5) * 4)[None, None], iou, one_square(whole, part))
    each = [mask_losses(((drawn - 0.5) * 4)[None, None], iou, one_square(mask)) for mask in (whole, part)]
    for name in ("focal", "dice", "miou"):
        assert both[name] == pytest.approx(float(each[0][name] + each[1][name]) / 2, abs=1e-6)


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


def test_pixels_are_normalised_as_for_masks() -> None:
    model = seeded_model(0, 64)
    rgb = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    pixels = torch.from_numpy(rgb.transpose(2, 0, 1).copy())[None]
    torch.testing.assert_close(normalised(pixels), model.preprocess(rgb)[0])
