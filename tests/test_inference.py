"""Layers that are faster in inference answer as in training, and are trained as before."""

import torch
from timm.models import tiny_vit
from torch import nn

from pipeline.model.inference import ConvNorm, Linear, hasten
from pipeline.model.tinyvit import TinyVitEncoder
from pipeline.model.weights import seeded_model


def test_the_encoder_answers_as_without_them() -> None:
    fast, plain = seeded_model(3, 64).image_encoder, TinyVitEncoder().eval()
    plain.load_state_dict(fast.state_dict())
    kinds = {type(layer) for layer in fast.modules()}
    assert {Linear, ConvNorm} <= kinds
    assert not {nn.Linear, tiny_vit.ConvNorm} & kinds
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = plain(pixels)
        torch.testing.assert_close(fast(pixels), expected, rtol=1e-4, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert 0 < (fast(pixels) - expected).abs().max() < 0.5
    assert torch.equal(fast(pixels), plain(pixels))  # with gradients


def test_a_normalisation_that_moved_counts_at_once() -> None:
    layer = nn.Sequential(tiny_vit.ConvNorm(4, 6, 3, 2, 1), tiny_vit.ConvNorm(6, 6, 3, 1, 1, groups=6)).eval()
    point = tiny_vit.ConvNorm(6, 8).eval()
    x = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(0))
    every = nn.Sequential(layer, point)
    hasten(every)
    for _ in range(2):
        with torch.inference_mode():
            fast = every(x)
        torch.testing.assert_close(fast, every(x), rtol=1e-5, atol=1e-5)
        every.train()(x)  # moves running means and variances
        every.eval()


def test_a_normalisation_in_training_mode_is_one_in_inference_too() -> None:
    layer = tiny_vit.ConvNorm(4, 6).train()
    hasten(layer)
    with torch.inference_mode():
        made = layer(torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(0)))
    assert made.mean((0, 2, 3)).abs().max() < 1e-5


def test_on_a_cpu_the_neck_sums_with_channels_first() -> None:
    """Its convolution rounds more with channels last."""
    encoder = seeded_model(3, 64).image_encoder
    seen: list[bool] = []
    encoder.neck.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].is_contiguous()))
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        encoder(pixels.contiguous(memory_format=torch.channels_last))
    assert seen == [True]
