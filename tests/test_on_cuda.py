"""Without a GPU: whatever the model makes on CUDA is there, of the right shape and type.

PyTorch's fake tensors have a device, a shape and a type, and no numbers; a step that takes tensors of two devices
is an error, as on a real one. Autocast, which bfloat16 has in the encoder, is not done.
"""

from contextlib import nullcontext

import numpy as np
import pytest
import skimage.data
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from pipeline.model.sam import Precision, SamModel

PROMPTS = 20


def move_to_cuda(model: SamModel, mode: FakeTensorMode) -> None:
    """Its parameters and buffers become fakes there."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = mode.from_tensor(parameter).to("cuda")
                module._parameters[name] = torch.nn.Parameter(fake, requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = mode.from_tensor(buffer).to("cuda")


@pytest.mark.filterwarnings("ignore:CUDA is not available:UserWarning")
@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_all_is_on_the_models_device(
    precision: Precision, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: nullcontext())
    model = SamModel("mobile_sam", 256, precision)
    rgb = skimage.data.coffee()
    with FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True) as mode:
        move_to_cuda(model, mode)
        first, second = model.encode_batch([rgb, rgb[:300]])
        assert (first.input_size, second.input_size) == ((171, 256), (128, 256))
        image = model.prepare(first)
        made = model.predict(image, np.ones((PROMPTS, 2)))
        (tokens,) = made.image_tokens  # of all prompts at once
        assert tokens.rows_NrL.dtype == dtype
        weights = torch.randn(PROMPTS, 3, 32, device="cuda")
        logits = torch.empty(PROMPTS, 3, 64, 64, device="cuda")
        model.fast_decoder.upscale(image.tables, tokens, weights, logits)
        everything = [
            first.features_1CHW,
            second.features_1CHW,
            made.iou_N3,
            made.mask_tokens_N3C,
            tokens.scale_N1L,
        ]
        assert {tensor.device.type for tensor in everything} == {"cuda"}
        assert {tensor.dtype for tensor in everything} == {torch.float32}
        assert made.iou_N3.shape == (PROMPTS, 3)
