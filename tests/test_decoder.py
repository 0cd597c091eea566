"""The decoder for many prompts of one image answers as segment-anything's."""

import pytest
import torch
from compiling import needs_compiler
from seeded import lively_state_dict, model_with
from segment_anything.modeling.common import LayerNorm2d

from pipeline.model import decoder, load_model
from pipeline.model.decoder import FastDecoder
from pipeline.model.native import NativeDecoder
from pipeline.model.sam import SamModel

Answers = tuple[torch.Tensor, torch.Tensor]


def prompts(model: SamModel, count: int, kind: str) -> torch.Tensor:
    corners = torch.rand(count, 2, 2) * model.image_size
    points = torch.rand(count, int(kind[0]), 2) * model.image_size, torch.randint(0, 2, (count, int(kind[0])))
    sparse: torch.Tensor = model.prompt_encoder(
        points=points if "point" in kind else None, boxes=corners.flatten(1) if "box" in kind else None, masks=None
    )[0]
    return sparse


def model_of(weights: str, image_size: int) -> SamModel:
    """With normalisations that scale and shift, as those of trained weights do."""
    if weights == "demo":
        return load_model("demo", device="cpu", image_size=image_size)
    model = model_with(lively_state_dict(), image_size)
    for module in model.mask_decoder.modules():
        if isinstance(module, torch.nn.LayerNorm | LayerNorm2d):
            module.weight.mul_(torch.rand_like(module.weight) + 0.5)
            module.bias.add_(torch.randn_like(module.bias) * 0.2)
    return model


def reference(model: SamModel, features: torch.Tensor, sparse: torch.Tensor) -> Answers:
    dense = model.prompt_encoder.no_mask_embed.weight.view(1, -1, 1, 1).expand(len(sparse), *features.shape[1:])
    masks, iou = model.mask_decoder.predict_masks(features, model.prompt_encoder.get_dense_pe(), sparse, dense)
    return masks, iou


def fast(
    model: SamModel,
    features: torch.Tensor,
    sparse: torch.Tensor,
    at_once: int,
    dtype: torch.dtype,
    *,
    decoder_class: type[FastDecoder] = FastDecoder,
) -> Answers:
    modules = model.mask_decoder
    runner = decoder_class(modules, dtype, dtype)
    positions = model.prompt_encoder.get_dense_pe()
    output = torch.cat([modules.iou_token.weight, modules.mask_tokens.weight])
    tokens = torch.cat([output.expand(len(sparse), -1, -1), sparse], dim=1)
    image = runner.image(features, model.prompt_encoder.no_mask_embed.weight.view(1, -1, 1, 1), positions)
    hidden, states = runner.run(image, tokens, at_once)
    weights = torch.stack(
        [head(hidden[:, 1 + i]) for i, head in enumerate(modules.output_hypernetworks_mlps)], dim=1
    )
    masks_NMSS = torch.empty(len(sparse), modules.num_mask_tokens, model.mask_size, model.mask_size)
    for state, *parts in zip(states, *(x.split(at_once) for x in (weights, masks_NMSS)), strict=True):
        runner.upscale(image, state, *parts)
    return masks_NMSS, modules.iou_prediction_head(hidden[:, 0])


@pytest.mark.parametrize("image_size", [64, 256])
@pytest.mark.parametrize("kind", ["1 point", "3 points", "1 box", "2 points and a box"])
@pytest.mark.parametrize("at_once", [1, 4, 100])
@pytest.mark.parametrize("weights", ["lively", "demo"])
@pytest.mark.parametrize("decoder_class", [FastDecoder, pytest.param(NativeDecoder, marks=needs_compiler)])
@torch.inference_mode()
def test_float32_answers_are_the_references(
    image_size: int, kind: str, at_once: int, weights: str, decoder_class: type[FastDecoder]
) -> None:
    torch.manual_seed(0)
    model = model_of(weights, image_size)
    grid = image_size // 16
    features = torch.randn(1, 256, grid, grid) * 0.5
    sparse = prompts(model, 9, kind)
    masks, iou = fast(model, features, sparse, at_once, torch.float32, decoder_class=decoder_class)
    expected, expected_iou = reference(model, features, sparse)
    assert masks.shape == expected.shape
    assert (masks - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (iou - expected_iou).abs().max() <= 1e-5 * expected_iou.abs().max()


@torch.inference_mode()
def test_strips_do_not_change_the_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = model_of("lively", 256)
    features = torch.randn(1, 256, 16, 16) * 0.5
    sparse = prompts(model, 9, "1 point")
    monkeypatch.setattr(decoder, "_PLACES", 100)  # of 256
    masks, iou = fast(model, features, sparse, 4, torch.float32)
    expected, expected_iou = reference(model, features, sparse)
    assert (masks - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (iou - expected_iou).abs().max() <= 1e-5 * expected_iou.abs().max()


@torch.inference_mode()
def test_bfloat16_answers_are_near() -> None:
    torch.manual_seed(0)
    model = model_with(lively_state_dict(), 256)
    features = torch.randn(1, 256, 16, 16) * 0.5
    sparse = prompts(model, 9, "1 point")
    masks, iou = fast(model, features, sparse, 4, torch.bfloat16)
    expected, expected_iou = reference(model, features, sparse)
    assert masks.dtype == iou.dtype == torch.float32
    assert 1e-4 < (masks - expected).abs().mean() / expected.abs().mean() < 0.1
    assert (iou - expected_iou).abs().max() < 0.05
