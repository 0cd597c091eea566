"""The decoder's kernels for a CPU: what they answer, and when they are chosen. See also test_decoder.py."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from compiling import needs_compiler, needs_matrix_unit
from test_decoder import fast, prompts, reference

from pipeline.model import load_model, native
from pipeline.model.decoder import FastDecoder
from pipeline.model.image_tokens import ImageTables, ImageTokens
from pipeline.model.native import NativeDecoder, native_decoder
from pipeline.model.sam import SamModel
from pipeline.model.weights import seeded_model

pytestmark = needs_compiler
Run = tuple[torch.Tensor, list[ImageTokens], torch.Tensor]


@pytest.fixture(scope="module")
def model() -> SamModel:
    return seeded_model(0, 256)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and a process that has compiled nothing."""
    monkeypatch.setenv("EVERYMASK_CACHE", str(tmp_path / "cache"))
    native._library.cache_clear()
    yield tmp_path / "cache"
    native._library.cache_clear()


@torch.inference_mode()
def run(decoder: FastDecoder, at_once: int, count: int = 9, side: int = 16) -> Run:
    random = torch.Generator().manual_seed(0)
    embedding, positions = torch.randn(2, 1, 256, side, side, generator=random)
    prompts = torch.randn(count, 7, 256, generator=random)
    weights = torch.randn(count, 3, 32, generator=random)
    image = decoder.image(embedding, torch.zeros_like(embedding), positions)
    tokens, states = decoder.run(image, prompts, at_once)
    logits = torch.empty(count, 3, 4 * side, 4 * side)
    for state, *parts in zip(states, *(x.split(at_once) for x in (weights, logits)), strict=True):
        decoder.upscale(image, state, *parts)
    return tokens, states, logits


def test_the_number_of_threads_and_of_prompts_at_once_change_rounding_only(model: SamModel) -> None:
    decoder = NativeDecoder(model.mask_decoder)
    threads = torch.get_num_threads()
    try:
        made = []
        for count, at_once in ((1, 9), (2, 4), (3, 1)):
            torch.set_num_threads(count)
            made.append(run(decoder, at_once, 9, 32))
    finally:
        torch.set_num_threads(threads)
    (right, _, logits), *others = made
    for tokens, _, found in others:
        torch.testing.assert_close(tokens, right, rtol=1e-5, atol=1e-5)  # PyTorch's own part differs
        torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_are_the_same_to_the_bit_in_any_number_of_threads(
    model: SamModel, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    decoder = NativeDecoder(model.mask_decoder, torch.float32, dtype)
    rows = []
    for threads in (1, 2, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        tokens, (state,), logits = run(decoder, 40, 40)
        rows.append((tokens, state.scale_N1L, state.rows_NrL, logits))
    for other in rows[1:]:
        assert all(map(torch.equal, other, rows[0]))


@torch.inference_mode()
def test_they_round_about_as_much_as_the_reference() -> None:
    torch.manual_seed(0)
    model = load_model("demo", "cpu", image_size=1024)
    features, sparse = torch.randn(1, 256, 64, 64) * 0.5, prompts(model, 12, "1 point")
    found = fast(model, features, sparse, 4, torch.float32, decoder_class=NativeDecoder)
    rounded = reference(model, features, sparse)
    dense = model.prompt_encoder.no_mask_embed.weight.view(1, -1, 1, 1).expand(len(sparse), *features.shape[1:])
    inputs = (features, model.prompt_encoder.get_dense_pe(), sparse, dense)
    exact = model.mask_decoder.double().predict_masks(*(tensor.double() for tensor in inputs))
    for right, other, mine in zip(exact, rounded, found, strict=True):
        assert (mine - right).abs().mean() <= 2 * (other - right).abs().mean()


def test_some_prompts_and_some_masks_are_upscaled(model: SamModel) -> None:
    answers = []
    wanted = torch.tensor([True, False, True, True, False])
    weights = torch.randn(3, 2, 32, generator=torch.Generator().manual_seed(1))
    for decoder in (FastDecoder(model.mask_decoder), NativeDecoder(model.mask_decoder)):
        random = torch.Generator().manual_seed(2)
        embedding, prompts = (torch.randn(shape, generator=random) for shape in ((1, 256, 16, 16), (5, 7, 256)))
        logits = torch.empty(3, 2, 64, 64)
        with torch.inference_mode():
            image: ImageTables = decoder.image(embedding, embedding, embedding)
            _, (state,) = decoder.run(image, prompts, 5)
            decoder.upscale(image, state.select(wanted), weights, logits)
        answers.append(logits)
    torch.testing.assert_close(answers[1], answers[0], rtol=1e-4, atol=1e-4)


@needs_matrix_unit
def test_in_bfloat16_masks_are_near_and_all_before_them_is_the_same(model: SamModel) -> None:
    matrix, one = torch.randn(64, 64).bfloat16(), torch.eye(64).bfloat16()
    assert torch.equal(matrix @ one, matrix)
    tokens, (state, _), logits = run(NativeDecoder(model.mask_decoder), 5)
    other_tokens, (other, _), found = run(NativeDecoder(model.mask_decoder, torch.float32, torch.bfloat16), 5)
    assert torch.equal(other_tokens, tokens)
    assert torch.equal(other.rows_NrL, state.rows_NrL)
    assert 1e-4 < float((found - logits).norm() / logits.norm()) < 5e-3
    assert (found - logits).abs().max() < 0.02 * logits.abs().max()
    assert torch.equal(matrix @ one, matrix)  # PyTorch uses the matrix unit too, and may have set it up before


def test_in_bfloat16_without_a_matrix_unit_masks_are_those_of_float32(
    model: SamModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native._library(), "knows_bfloat16", lambda: False)
    _, _, right = run(NativeDecoder(model.mask_decoder), 9)
    _, _, found = run(NativeDecoder(model.mask_decoder, torch.float32, torch.bfloat16), 9)
    assert torch.equal(found, right)


def test_an_image_of_81_places_is_left_to_plain_pytorch(model: SamModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_call", lambda *_: pytest.fail("called"))
    plain, kernels = (each(model.mask_decoder) for each in (FastDecoder, NativeDecoder))
    right, _, logits = run(plain, 9, side=9)
    tokens, _, found = run(kernels, 9, side=9)
    assert torch.equal(tokens, right)
    assert torch.equal(found, logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_number_stays_none(model: SamModel, dtype: torch.dtype) -> None:
    decoder = NativeDecoder(model.mask_decoder, torch.float32, dtype)
    embedding, prompts = torch.randn(1, 256, 16, 16), torch.randn(2, 7, 256)
    embedding[0, 3, 5, 5] = torch.nan
    logits = torch.empty(2, 3, 64, 64)
    with torch.inference_mode():
        image = decoder.image(embedding, torch.zeros_like(embedding), torch.zeros_like(embedding))
        tokens, (state,) = decoder.run(image, prompts, 2)
        decoder.upscale(image, state, torch.randn(2, 3, 32), logits)
    assert tokens.isnan().all()
    assert logits.isnan().all()


def test_what_is_next_to_nothing_is_zero(model: SamModel) -> None:
    decoder = NativeDecoder(model.mask_decoder)
    random = torch.Generator().manual_seed(0)
    embedding, prompts = (10 * torch.randn(shape, generator=random) for shape in ((1, 256, 16, 16), (9, 7, 256)))
    with torch.inference_mode():
        _, (state,) = decoder.run(decoder.image(embedding, embedding, embedding), prompts, 9)
    weights = state.rows_NrL
    assert (weights == 0).any()
    assert weights[weights != 0].abs().min() >= torch.finfo(torch.float32).smallest_normal


def test_a_model_on_a_cpu_takes_them() -> None:
    assert type(load_model("demo", "cpu").fast_decoder) is NativeDecoder
    assert type(load_model("demo", "cpu", "bf16").fast_decoder) is NativeDecoder
    assert type(load_model("demo", "cpu", kernels=False).fast_decoder) is FastDecoder


def test_they_are_compiled_once(model: SamModel, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = FastDecoder(model.mask_decoder)
    assert native_decoder(plain) is NativeDecoder
    (library,) = cache.iterdir()
    written = library.stat().st_mtime_ns
    native._library.cache_clear()
    assert native_decoder(plain) is NativeDecoder
    assert [path.stat().st_mtime_ns for path in cache.iterdir()] == [written]
    native._library.cache_clear()
    monkeypatch.setattr(native, "_FLAGS", (*native._FLAGS, "-g"))
    assert native_decoder(plain) is NativeDecoder
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"PATH": "/nowhere"}, "no C++ compiler (c++, g++ or clang++) is in $PATH"),
        ({"CXX": "/nowhere/c++ -m64"}, "[Errno 2] No such file or directory: '/nowhere/c++'"),
        ({"CXX": "c++ -include /nowhere.h"}, "/nowhere.h: No such file or directory"),
    ],
    ids=["no compiler", "not that one", "it fails"],
)
def test_where_they_cannot_be_compiled_one_line_says_so(  # noqa: PLR0917
    model: SamModel,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    environment: dict[str, str],
    said: str,
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert native_decoder(FastDecoder(model.mask_decoder)) is FastDecoder
    (line,) = caplog.messages
    assert line.startswith("the decoder is plain PyTorch, which is slower: ")
    assert said in line
    assert not cache.exists() or not list(cache.iterdir())


def test_where_nothing_can_be_kept_they_are_compiled_all_the_same(model: SamModel, cache: Path) -> None:
    cache.write_text("no folder")
    assert native_decoder(FastDecoder(model.mask_decoder)) is NativeDecoder


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_matrix_unit)])
def test_wrong_answers_are_not_taken(
    model: SamModel,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    dtype: torch.dtype,
) -> None:
    call = native._call

    def wrong(name: str, *arguments: object) -> None:
        call(name, *arguments)
        if (
            name == "upscale"
            and arguments[0] == (dtype == torch.bfloat16)
            and isinstance(logits := arguments[-1], torch.Tensor)
        ):
            logits[0, 0, 0, 0] += 100

    monkeypatch.setattr(native, "_call", wrong)
    assert native_decoder(FastDecoder(model.mask_decoder, torch.float32, dtype)) is FastDecoder
    assert f"its error in {dtype} is" in caplog.text


def test_cpus_for_which_they_were_not_measured_do_without(
    model: SamModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    monkeypatch.setattr(native, "_library", lambda: pytest.fail("compiled"))
    with caplog.at_level(logging.INFO, "everymask"):
        assert native_decoder(FastDecoder(model.mask_decoder)) is FastDecoder
    (line,) = caplog.messages
    assert "DEFAULT" in line
