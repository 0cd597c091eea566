"""Run as a program: what the kernels answer in Triton's interpreter, which needs no GPU, beside plain PyTorch.

It prints the relative norms of the differences as JSON, by type, image size and tokens a prompt, and the trial's.
Triton asks for the interpreter when a kernel is declared, so this cannot be a fixture.
"""

import json
import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from pipeline.model import fused
from pipeline.model.decoder import FastDecoder
from pipeline.model.sam import SamModel


@torch.inference_mode()
def main() -> None:
    """Compare, and print."""
    torch.manual_seed(0)
    cases = [(torch.float32, 192, 7), (torch.float32, 128, 8), (torch.bfloat16, 160, 7)]
    _mend_products_of_bfloat16()
    errors = {" ".join(map(str, case)): _errors(*case) for case in cases}
    torch.cuda.synchronize = lambda: None  # type: ignore[assignment, misc]
    fused._PROMPTS, fused._ROUNDS = 3, 1  # type: ignore[misc]
    model = _model(64)
    errors["trial"] = fused._trial(FastDecoder(model.mask_decoder), 4)[:1]
    print(json.dumps(errors))


def _model(image_size: int) -> SamModel:
    model = SamModel("mobile_sam", image_size, "fp32")
    for tensor in model.mask_decoder.parameters():
        tensor.add_(torch.randn_like(tensor) * 0.05)
    return model


def _mend_products_of_bfloat16() -> None:
    """The interpreter multiplies the integers that bfloat16 is kept in."""
    create_dot = interpreter.InterpreterBuilder.create_dot

    def as_float32(tensor: interpreter.TensorHandle) -> interpreter.TensorHandle:
        if tensor.dtype.scalar != tl.bfloat16:
            return tensor
        return interpreter.TensorHandle((tensor.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    interpreter.InterpreterBuilder.create_dot = lambda self, one, other, *rest: create_dot(
        self, as_float32(one), as_float32(other), *rest
    )


def _errors(dtype: torch.dtype, image_size: int, tokens: int) -> list[float]:
    model, side = _model(image_size), image_size // 16
    embedding, positions = torch.randn(2, 1, 256, side, side)
    prompts = torch.randn(5, tokens, 256)
    plain, kernels = (each(model.mask_decoder, dtype) for each in (FastDecoder, fused.FusedDecoder))
    image = plain.image(embedding, torch.randn(1, 256, 1, 1), positions)
    (right, right_states), (found, states) = (decoder.run(image, prompts, 3) for decoder in (plain, kernels))
    pairs = [(found, right)]
    for state, expected in zip(states, right_states, strict=True):
        pairs += [(state.rows_NrL, expected.rows_NrL), (state.scale_N1L, expected.scale_N1L)]
    return [float((one.float() - other.float()).norm() / other.float().norm()) for one, other in pairs]


if __name__ == "__main__":
    main()
