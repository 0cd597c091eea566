"""The decoder's Triton kernels, as far as they can be tried without a GPU, and when they are chosen."""

import json
import logging
import math
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline import model
from pipeline.model import fused
from pipeline.model.decoder import FastDecoder
from pipeline.model.fused import FusedDecoder, decoder_for
from pipeline.model.sam import Precision, SamModel

triton = pytest.importorskip("triton", reason="Triton is not on this machine")
compiler = pytest.importorskip("triton.compiler")

SHARED_MEMORY = {(8, 0): 163 << 10, (8, 6): 99 << 10, (9, 0): 227 << 10, (10, 0): 227 << 10, (12, 0): 99 << 10}
"""Bytes that a block may take, by compute capability: CUDA C++ Programming Guide, technical specifications."""


def test_kernels_answer_as_plain_pytorch_does_in_the_interpreter() -> None:
    program = Path(__file__).with_name("interpreted_kernels.py")
    answer = subprocess.run([sys.executable, program], capture_output=True, text=True, check=True)
    errors: dict[str, list[float]] = json.loads(answer.stdout.splitlines()[-1])
    limits = {
        "torch.float32 192 7": 1e-5,
        "torch.float32 128 8": 1e-5,
        "torch.bfloat16 160 7": 0.01,
        "trial": 1e-5,
    }
    assert errors.keys() == limits.keys()
    assert all(max(each) < limits[case] for case, each in errors.items()), errors


class Recorder:
    """In place of a kernel: keeps what it is launched with."""

    def __init__(self) -> None:
        self.launches: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **named: self.launches.append((arguments, named))


@pytest.fixture(scope="module")
def launches() -> dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """What the decoder launches each kernel with, in bfloat16, for prompts of 1024 x 1024 images."""
    recorders = SimpleNamespace(update=Recorder(), read=Recorder())
    weights = SamModel("mobile_sam", 1024, "bf16").mask_decoder
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(fused, "_kernels", lambda: recorders)
        decoder = FusedDecoder(weights, torch.bfloat16, torch.bfloat16)
        embedding = torch.zeros(1, 256, 64, 64)
        decoder.run(decoder.image(embedding, embedding, embedding), torch.zeros(2, 7, 256), 2)
    return {"update": recorders.update.launches, "read": recorders.read.launches}


def test_each_layer_is_one_launch_of_each_kernel(launches: dict[str, list[Any]]) -> None:
    assert [named["ROWS"] for _, named in launches["update"]] == [0, 57]
    assert [named["ROWS"] for _, named in launches["read"]] == [57, 114]


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("name", ["update", "read"])
def test_kernels_compile_and_fit_on_gpus_that_are_not_here(
    name: str, capability: tuple[int, int], launches: dict[str, list[Any]]
) -> None:
    kernel = getattr(fused._kernels(), name)
    for arguments, named in launches[name]:
        options = {option: named[option] for option in ("num_warps", "num_stages", "enable_fp_fusion")}
        constants = {argument: value for argument, value in named.items() if argument not in options}
        passed = dict(zip(kernel.arg_names, arguments, strict=False))
        assert kernel.arg_names == [*passed, *constants]
        signature = {argument: _type(value) for argument, value in passed.items()} | dict.fromkeys(
            constants, "constexpr"
        )
        aligned = {
            (position,): [["tt.divisibility", 16]]
            for position, value in enumerate(arguments)
            if not isinstance(value, float)
        }
        source = compiler.ASTSource(kernel, signature, constants, aligned)
        target = triton.backends.compiler.GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
        compiled = triton.compile(source, target=target, options=options)
        assert compiled.asm["cubin"]
        assert compiled.metadata.shared <= SHARED_MEMORY[capability]


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        assert value.is_contiguous()
        return {torch.float32: "*fp32", torch.bfloat16: "*bf16"}[value.dtype]
    return {int: "i32", float: "fp32"}[type(value)]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    return monkeypatch


@pytest.mark.parametrize(
    ("trial", "chosen"),
    [
        ((0.01, 2e-3, 1e-3), FusedDecoder),
        ((0.01, 1e-3, 2e-3), FastDecoder),
        ((0.01, 1e-3, 0.95e-3), FastDecoder),
        ((0.05, 2e-3, 1e-3), FastDecoder),
        ((math.nan, 2e-3, 1e-3), FastDecoder),
    ],
    ids=["faster", "slower", "hardly faster", "wrong", "not a number"],
)
def test_kernels_are_chosen_where_they_are_right_and_faster(
    gpu: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    trial: tuple[float, ...],
    chosen: type[FastDecoder],
) -> None:
    gpu.setattr(fused, "_trial", lambda *_: trial)
    with caplog.at_level(logging.INFO, "everymask"):
        assert decoder_for(_decoder(), 4) is chosen
    (line,) = caplog.messages
    assert "a GPU decodes 256 prompts" in line
    assert line.endswith(chosen.__name__)


def test_where_nothing_can_be_compiled_one_line_says_so(
    gpu: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_compiler(*_: Any) -> tuple[float, ...]:
        raise RuntimeError("first line\nFailed to find C compiler.")

    gpu.setattr(fused, "_trial", no_compiler)
    assert decoder_for(_decoder(), 4) is FastDecoder
    assert caplog.messages == ["no kernels for a GPU, the decoder is plain PyTorch: Failed to find C compiler."]


def test_kernels_are_not_tried_on_gpus_without_bfloat16(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    gpu.setattr(fused, "_trial", lambda *_: pytest.fail("tried"))
    assert decoder_for(_decoder(), 4) is FastDecoder


@pytest.mark.parametrize(
    ("precision", "kernels", "tried"), [("bf16", True, 1), ("bf16", False, 0), ("fp32", True, 0)]
)
def test_a_model_in_bfloat16_on_a_gpu_takes_what_is_chosen(
    monkeypatch: pytest.MonkeyPatch, precision: Precision, kernels: bool, tried: int
) -> None:
    sides: list[int] = []
    monkeypatch.setattr(model, "pick_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(SamModel, "to", lambda *_: None)
    monkeypatch.setattr(model, "decoder_for", lambda _, side: sides.append(side) or FusedDecoder)
    loaded = model.load_model("demo", "cuda", precision, kernels=kernels)
    assert sides == [loaded.image_size // 16] * tried
    assert type(loaded.fast_decoder) is (FusedDecoder if tried else FastDecoder)


def test_prompts_of_many_tokens_are_left_to_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_kernels", lambda: pytest.fail("launched"))
    plain, kernels = (
        each(SamModel("mobile_sam", 64, "fp32").mask_decoder) for each in (FastDecoder, FusedDecoder)
    )
    kernels.decoder = plain.decoder
    embedding, prompts = torch.randn(1, 256, 4, 4), torch.randn(2, 9, 256)
    with torch.inference_mode():
        image = plain.image(embedding, embedding, embedding)
        right, found = (decoder.run(image, prompts, 2)[0] for decoder in (plain, kernels))
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)


def _decoder() -> FastDecoder:
    return FastDecoder(SamModel("mobile_sam", 64, "bf16").mask_decoder)
