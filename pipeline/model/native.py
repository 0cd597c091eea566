"""The mask decoder on a CPU, its passes over image tokens in C++ (`native.cpp`), compiled when first needed.

Plain PyTorch makes some twenty passes over N x 57 x 4096 numbers and more, each of them from memory to memory, and
its libraries are slow at products of 7 tokens with 16 channels. Small products with weights stay PyTorch's.

Without a compiler, or on a CPU for which this was not measured, all is plain PyTorch.
"""

import ctypes
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final, cast

import torch
from segment_anything.modeling import MaskDecoder
from torch.nn import functional as F

from pipeline.model.cache import cache_folder
from pipeline.model.decoder import FastDecoder, as_linear, per_head
from pipeline.model.image_tokens import ImageTables, ImageTokens, Layer, Norm, Projection

_MOST_TOKENS: Final = 8  # of a prompt
_PLACES: Final = 64  # of a block
_SOURCE: Final = Path(__file__).with_name("native.cpp")
_HEADER: Final = Path(__file__).with_name("native_math.h")
_FLAGS: Final = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-pthread", "-shared", "-fPIC")
_LARGEST_ERRORS: Final = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of the norm
_DEEP: Final = 32  # columns of a matrix unit's tile in bfloat16
_log = logging.getLogger("everymask")


@dataclass(frozen=True)
class NativeTables(ImageTables):
    """Tables of an image of which those over its L places lie in blocks of 64: L / 64 x rows x 64."""

    plain: ImageTables
    """As `FastDecoder` has them."""


@dataclass(frozen=True)
class NativeTokens(ImageTokens):
    """Image tokens whose rows lie in blocks: L / 64 x r x 64 a prompt."""

    which_N: torch.Tensor
    """Of the prompts that there is a scale and rows for, those that are meant."""

    def select(self, keep: torch.Tensor) -> "NativeTokens":
        """Those of the prompts that a bool mask names; their rows, megabytes each, stay where they are."""
        return NativeTokens(self.scale_N1L, self.rows_NrL, self.basis_NrC[keep], self.which_N[keep])

    def __len__(self) -> int:
        return len(self.which_N)


class NativeDecoder(FastDecoder):
    """A `FastDecoder` of the same answers but for rounding, on a CPU.

    Up to the predicted IoU all is in float32, whatever type was asked for. So is upscaling, unless bfloat16 was
    asked for and the CPU has a matrix unit for that (AMX).

    Left to plain PyTorch are prompts of more than 8 tokens, and images whose number of places is no multiple of 64
    or which are not in float32.
    """

    def __init__(self, decoder: MaskDecoder, *dtypes: torch.dtype) -> None:
        """As `FastDecoder`; of what is left to plain PyTorch the types are always those."""
        super().__init__(decoder)
        self._plain = FastDecoder(decoder, *dtypes)
        self._bfloat16 = self._plain.upscaling_dtype == torch.bfloat16 and bool(_library().knows_bfloat16())

    @staticmethod
    def prompts_at_once() -> int:
        """So many for each thread as share a block of tables."""
        return 8 * torch.get_num_threads()

    def image(
        self, features_1CHW: torch.Tensor, dense_1CHW: torch.Tensor, positions_1CHW: torch.Tensor
    ) -> ImageTables:
        """As `FastDecoder.image`."""
        fits = features_1CHW.dtype == torch.float32 and features_1CHW.device.type == "cpu"
        if not fits or features_1CHW[0, 0].numel() % _PLACES:
            return self._plain.image(features_1CHW, dense_1CHW, positions_1CHW)
        plain = super().image(features_1CHW, dense_1CHW, positions_1CHW)
        return NativeTables(
            tuple(
                Layer(
                    _projection_in_blocks(layer.keys),
                    _projection_in_blocks(layer.values),
                    _projection_in_blocks(layer.queries),
                    layer.basis_hdC,
                    Norm(
                        tuple(map(_in_blocks, layer.norm.dots_hdL)),
                        tuple(2 * dots_1L for dots_1L in layer.norm.constant_dots_1L),
                        layer.norm.energy_L,
                        layer.norm.constant_C,
                    ),
                )
                for layer in plain.layers
            ),
            _projection_in_blocks(plain.keys),
            _projection_in_blocks(plain.values),
            plain.upscaling_ioC,
            _in_blocks(plain.upscaling_shared_iLo.mT),
            plain.upscaling_rest_io,
            plain,
        )

    def run(
        self, image: ImageTables, prompts_NTC: torch.Tensor, at_once: int
    ) -> tuple[torch.Tensor, list[ImageTokens]]:
        """As `FastDecoder.run`."""
        if not isinstance(image, NativeTables):
            return self._plain.run(image, prompts_NTC, at_once)
        if prompts_NTC.shape[1] > _MOST_TOKENS:
            return FastDecoder(self.decoder).run(image.plain, prompts_NTC, at_once)
        return super().run(image, prompts_NTC, at_once)

    def upscale(
        self, image: ImageTables, tokens: ImageTokens, weights_NMc: torch.Tensor, logits_NMSS: torch.Tensor
    ) -> None:
        """As `FastDecoder.upscale`."""
        if not isinstance(image, NativeTables):
            self._plain.upscale(image, tokens, weights_NMc, logits_NMSS)
            return
        if not isinstance(tokens, NativeTokens):
            FastDecoder(self.decoder).upscale(image.plain, tokens, weights_NMc, logits_NMSS)
            return
        _, norm, _, last, _ = cast(Any, self.decoder.output_upscaling)
        _, blocks, rows, _ = tokens.rows_NrL.shape
        by_row_Nor = torch.cat([weight_oC @ tokens.basis_NrC.mT for weight_oC in image.upscaling_ioC], dim=1)
        by_row_Nqcr = by_row_Nor.view(len(tokens), 4, -1, rows)
        last_ioc, last_bias_o = as_linear(last)
        last_oc = last_ioc.flatten(0, 1)
        if self._bfloat16:
            by_row, last_map = F.pad(by_row_Nqcr, (0, -rows % _DEEP)).bfloat16(), last_oc.bfloat16()
        else:
            by_row, last_map = by_row_Nqcr.mT, last_oc.T
        _call(
            "upscale",
            *(self._bfloat16, len(tokens), blocks, rows),
            *(logits_NMSS.shape[1], logits_NMSS.shape[3] // 4, norm.eps),
            *(tokens.which_N, by_row.contiguous(), tokens.scale_N1L, tokens.rows_NrL),
            *(image.upscaling_shared_iLo, image.upscaling_rest_io, norm.weight, norm.bias),
            *(last_map.contiguous(), last_bias_o.repeat(2), weights_NMc.mT.contiguous()),
            logits_NMSS,
        )

    def _image_tokens(self, image: ImageTables, count: int) -> ImageTokens:
        plain = super()._image_tokens(cast(NativeTables, image).plain, count)
        return NativeTokens(plain.scale_N1L, _new_rows(plain.scale_N1L, 0), plain.basis_NrC, torch.arange(count))

    def _read_some(
        self, keys: Projection, values: Projection, queries_NhTd: torch.Tensor, state: ImageTokens
    ) -> torch.Tensor:
        count, heads, tokens, each = queries_NhTd.shape
        _, blocks, rows, _ = state.rows_NrL.shape
        # Two heads at a time, each in columns of its own, so that they fill a vector.
        pairs_N4idi8 = queries_NhTd.new_zeros(count, heads // 2, 2, each, 2, _MOST_TOKENS)
        by_pair_N4dti = queries_NhTd.view(count, heads // 2, 2, tokens, each).permute(0, 1, 4, 3, 2)
        pairs_N4idi8.diagonal(dim1=2, dim2=4)[..., :tokens, :] = by_pair_N4dti
        of_values_N4idi8 = torch.empty_like(pairs_N4idi8)
        of_rows_Nrh8 = queries_NhTd.new_empty(count, rows, heads, _MOST_TOKENS)
        through_Nor = self._through(queries_NhTd, keys, state)
        through_Nrh8 = None
        if through_Nor is not None:
            through_NrhT = through_Nor.mT.view(count, rows, heads, tokens)
            through_Nrh8 = F.pad(through_NrhT, (0, _MOST_TOKENS - tokens)).contiguous()
        _call(
            "read_places",
            *(count, blocks, rows, pairs_N4idi8, through_Nrh8, state.scale_N1L, state.rows_NrL),
            *(keys.shared_hdL, keys.rest_hdL, values.shared_hdL, of_values_N4idi8, of_rows_Nrh8),
        )
        own_N4dti = of_values_N4idi8.diagonal(dim1=2, dim2=4)[..., :tokens, :]
        own_NhTd = own_N4dti.permute(0, 1, 4, 3, 2).flatten(1, 2)
        if values.rest_hdL is None:
            return own_NhTd
        by_row_Nor = of_rows_Nrh8[..., :tokens].flatten(2).mT
        through_NhTC = torch.bmm(by_row_Nor, state.basis_NrC).view(count, heads, tokens, -1)
        through_NhTd = per_head(through_NhTC.transpose(0, 1), values.weight_hdC.mT).transpose(0, 1)
        return own_NhTd + through_NhTd + values.rest_hdL.mT

    def _updated_some(
        self, norm: Any, tables: Layer, state: ImageTokens, keys_NhTd: torch.Tensor, values: list[torch.Tensor]
    ) -> ImageTokens:
        count, _, tokens, _ = keys_NhTd.shape
        _, blocks, old, _ = state.rows_NrL.shape
        basis_NrC = self._basis(tables, state, values[-1])
        gram_Nrr = torch.bmm(basis_NrC, basis_NrC.mT).tril_()  # symmetric, so half of it is enough
        gram_Nrr = 2 * gram_Nrr - torch.diag_embed(gram_Nrr.diagonal(dim1=1, dim2=2))
        through_Nor = self._through(keys_NhTd, tables.queries, state)
        scale_N1L = torch.empty_like(state.scale_N1L)
        rows_NbrP = _new_rows(scale_N1L, basis_NrC.shape[1])
        _call(
            "update",
            *(count, blocks, tokens, old, len(values), float(basis_NrC.shape[2]), norm.eps),
            *(keys_NhTd.mT.contiguous(), None if through_Nor is None else through_Nor.mT.contiguous()),
            *([2 * few_NhTd.mT.contiguous() for few_NhTd in values], gram_Nrr, state.scale_N1L, state.rows_NrL),
            *(tables.queries.shared_hdL, tables.queries.rest_hdL, tables.norm.dots_hdL),
            *(tables.norm.constant_dots_1L, tables.norm.energy_L, scale_N1L, rows_NbrP),
        )
        return NativeTokens(scale_N1L, rows_NbrP, basis_NrC * norm.weight, torch.arange(count))


def native_decoder(plain: FastDecoder) -> type[FastDecoder]:
    """`NativeDecoder` where it can be compiled and answers as a plain one does, else `FastDecoder`.

    Args:
        plain: With the weights, on a CPU.

    Returns:
        The class. Why it is the plain one is logged in one line.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in {"AVX2", "AVX512"}:
        _log.info("the decoder is plain PyTorch: there are no kernels for a CPU without AVX2 (%s)", capability)
        return FastDecoder
    try:
        _library()
        errors = {dtype: _error(plain.decoder, dtype) for dtype in {torch.float32, plain.upscaling_dtype}}
    except (OSError, subprocess.SubprocessError) as failure:
        said = getattr(failure, "stderr", None) or str(failure)
        _log.warning("the decoder is plain PyTorch, which is slower: %s", said.strip().splitlines()[0])
        return FastDecoder
    for dtype, error in errors.items():
        if not error <= _LARGEST_ERRORS[dtype]:
            _log.warning(
                "the decoder is plain PyTorch: compiled for this CPU, its error in %s is %.1e", dtype, error
            )
            return FastDecoder
    return NativeDecoder


@torch.inference_mode()
def _error(modules: MaskDecoder, upscaling_dtype: torch.dtype) -> float:
    """The largest of what the native decoder makes of some prompts, against the plain one in float32."""
    plain, native = FastDecoder(modules), NativeDecoder(modules, torch.float32, upscaling_dtype)
    generator = torch.Generator().manual_seed(0)
    channels = modules.mask_tokens.weight.shape[1]
    embedding, positions = torch.randn(2, 1, channels, 16, 16, generator=generator)
    prompts = torch.randn(3, 7, channels, generator=generator)
    weights = torch.randn(3, 2, channels // 8, generator=generator)
    answers = []
    for decoder in (plain, native):
        image = decoder.image(embedding, torch.zeros_like(embedding), positions)
        tokens, (state,) = decoder.run(image, prompts, len(prompts))
        logits = torch.empty(3, 2, 64, 64)
        decoder.upscale(image, state, weights, logits)
        answers.append((tokens, logits))
    return max(float((found - right).norm() / right.norm()) for right, found in zip(*answers, strict=True))


@cache
def _library() -> ctypes.CDLL:
    """The compiled kernels, from the cache if they are there.

    Raises:
        OSError: there is no compiler, or what it made cannot be loaded.
        subprocess.SubprocessError: it fails.
    """
    compiler = _compiler()
    # All that the compiler knows of itself and of this CPU.
    macros = _run([*compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull])
    known = "\0".join([_SOURCE.read_text(), _HEADER.read_text(), *_FLAGS, macros])
    path = cache_folder() / f"native-{hashlib.sha256(known.encode()).hexdigest()[:16]}.so"
    if path.exists():
        return ctypes.CDLL(str(path))
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            folder = stack.enter_context(tempfile.TemporaryDirectory(dir=path.parent))
        except OSError:  # nothing can be kept
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            path = Path(folder, path.name)
        made = Path(folder, "made.so")
        _run([*compiler, *_FLAGS, "-o", str(made), str(_SOURCE)])
        made.replace(path)  # another process sees all of it or nothing
        return ctypes.CDLL(str(path))


def _compiler() -> list[str]:
    if named := os.environ.get("CXX"):
        return shlex.split(named)
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return [path]
    raise OSError("no C++ compiler (c++, g++ or clang++) is in $PATH")


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)  # noqa: S603 (a compiler)
    return done.stdout


def _call(name: str, *arguments: Any) -> None:
    """Call a kernel: with the number of threads, and numbers, tensors and lists of tensors."""
    getattr(_library(), name)(ctypes.c_long(torch.get_num_threads()), *map(_argument, arguments))


def _argument(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return ctypes.c_void_p(_address(value))
    if value is None:
        return ctypes.c_void_p()
    if isinstance(value, (list, tuple)):
        return (ctypes.c_void_p * len(value))(*map(_address, value))
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_long(value)


def _address(tensor: torch.Tensor) -> int:
    known = tensor.dtype in {torch.float32, torch.bfloat16, torch.int64} and tensor.device.type == "cpu"
    if not known or not tensor.is_contiguous():
        raise TypeError(f"a kernel was given {tensor.dtype} on {tensor.device} with strides {tensor.stride()}")
    return tensor.data_ptr()


def _new_rows(scale_N1L: torch.Tensor, rows: int) -> torch.Tensor:
    count, _, places = scale_N1L.shape
    return scale_N1L.new_empty(count, places // _PLACES, rows, _PLACES)


def _in_blocks(table_hdL: torch.Tensor) -> torch.Tensor:
    heads, each, places = table_hdL.shape
    return table_hdL.reshape(heads * each, places // _PLACES, _PLACES).transpose(0, 1).contiguous()


def _projection_in_blocks(projection: Projection) -> Projection:
    rest_hdL = projection.rest_hdL
    if rest_hdL is not None and rest_hdL.shape[2] > 1:  # values have no positions
        rest_hdL = _in_blocks(rest_hdL)
    return Projection(projection.weight_hdC, _in_blocks(projection.shared_hdL), rest_hdL)
