"""The mask decoder on a GPU, its passes over image tokens fused into two Triton kernels a layer.

Plain PyTorch makes some twenty passes over N x 57 x 4096 numbers and more, each of them from memory to memory;
the kernels read these once and write what is kept. Small products with weights stay PyTorch's.

Whether that pays is found out on the device itself: `decoder_for` lets both decode the same prompts.
"""

import logging
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
from torch.nn import functional as F

from pipeline.model.decoder import FastDecoder
from pipeline.model.image_tokens import ImageTokens, Layer, Projection

MOST_TOKENS: Final = 8
"""Of a prompt."""
_HEADS: Final = 8
_INNER: Final = 128  # channels of all heads together
_PROMPTS: Final = 256  # of a trial
_ROUNDS: Final = 5
_COMPARED: Final = 16  # of these prompts; in float32, which takes memory
_LARGEST_ERROR: Final = 0.03  # of the norm, as bfloat16's
_LARGEST_SHARE: Final = 0.9  # of plain PyTorch's time, so that chance does not decide between workers of one kind
_log = logging.getLogger("everymask")


class FusedDecoder(FastDecoder):
    """A `FastDecoder` of the same answers but for rounding. Of prompts of more than 8 tokens it is no faster."""

    def _read_some(
        self, keys: Projection, values: Projection, queries_NhTd: torch.Tensor, state: ImageTokens
    ) -> torch.Tensor:
        count, heads, tokens, _ = queries_NhTd.shape
        if keys.rest_hdL is None or values.rest_hdL is None:  # the same image tokens for all prompts
            queries_1hqd = queries_NhTd.to(self.dtype).transpose(0, 1).reshape(1, heads, count * tokens, -1)
            keys_1hLd, values_1hLd = (table.shared_hdL.mT.contiguous()[None] for table in (keys, values))
            read_1hqd = F.scaled_dot_product_attention(queries_1hqd, keys_1hLd, values_1hLd, scale=1.0)
            return read_1hqd.view(heads, count, tokens, -1).transpose(0, 1).float()
        if tokens > MOST_TOKENS:
            return super()._read_some(keys, values, queries_NhTd, state)
        kernels = _kernels()
        rows, places = state.rows_NrL.shape[1:]
        padded = _padded(rows)
        through_NrC = _through(queries_NhTd, keys.weight_hdC)
        through_N64o = _by_token(torch.bmm(through_NrC, state.basis_NrC.mT), tokens, padded, self.dtype)
        read_N64c = state.scale_N1L.new_empty(count, 64, _INNER)
        read_rows_N64o = state.scale_N1L.new_empty(count, 64, padded)
        kernels.read[(count,)](
            _block_diagonal(queries_NhTd, self.dtype),
            through_N64o,
            state.scale_N1L,
            state.rows_NrL,
            keys.shared_hdL,
            keys.rest_hdL,
            values.shared_hdL,
            read_N64c,
            read_rows_N64o,
            places,
            ROWS=rows,
            PADDED_ROWS=padded,
            BLOCK=32,
            num_warps=8,
            num_stages=2,
            enable_fp_fusion=True,
        )
        by_head = read_N64c.view(count, heads, MOST_TOKENS, heads, -1).diagonal(dim1=1, dim2=3)
        own_NhTd = by_head[:, :tokens].permute(0, 3, 1, 2)
        by_row_NhTr = read_rows_N64o.view(count, heads, MOST_TOKENS, padded)[:, :, :tokens, :rows]
        through_NhTC = torch.bmm(by_row_NhTr.flatten(1, 2), state.basis_NrC).view(count, heads, tokens, -1)
        through_NhTd = torch.einsum("nhtc,hdc->nhtd", through_NhTC, values.weight_hdC)
        return own_NhTd + through_NhTd + values.rest_hdL.mT

    def _updated_some(
        self, norm: Any, tables: Layer, state: ImageTokens, keys_NhTd: torch.Tensor, values: list[torch.Tensor]
    ) -> ImageTokens:
        count, heads, tokens, _ = keys_NhTd.shape
        if tokens > MOST_TOKENS or len(values) > 2:
            return super()._updated_some(norm, tables, state, keys_NhTd, values)
        kernels = _kernels()
        rows, places = state.rows_NrL.shape[1:]
        padded, own = _padded(rows), heads * tokens
        basis_NrC = self._basis(tables, state, values[-1])
        gram_Nrr = torch.bmm(basis_NrC, basis_NrC.mT)
        old, new, last = slice(rows), slice(rows, rows + own), rows + own
        constants_N65 = gram_Nrr.new_zeros(count, 65)
        constants_N65[:, :64] = _by_token(gram_Nrr[:, new, last:], tokens, 1)[:, :, 0]
        constants_N65[:, 64] = gram_Nrr[:, last, last]
        gram_N6464 = _between_tokens(gram_Nrr[:, new, new], tokens, self.dtype)
        through_N64o = cross_N64o = old_values_Noc = old_gram_Noo = gram_N6464  # not read where there are no rows
        old_constants_No = constants_N65
        if rows:
            through_NrC = _through(keys_NhTd, tables.queries.weight_hdC)
            through_N64o = _by_token(torch.bmm(through_NrC, state.basis_NrC.mT), tokens, padded, self.dtype)
            cross_N64o = _by_token(2 * gram_Nrr[:, new, old], tokens, padded, self.dtype)
            spare = padded - rows
            old_gram_Noo = F.pad(gram_Nrr[:, old, old], (0, spare, 0, spare)).to(self.dtype)
            old_constants_No = F.pad(gram_Nrr[:, last, old], (0, spare))
            blocks_N64c = _block_diagonal(values[0], self.dtype).view(count, heads, MOST_TOKENS, _INNER)
            old_values_Noc = F.pad(blocks_N64c[:, :, :tokens].flatten(1, 2), (0, 0, 0, padded - own))
        (*old_dots, dots_hdL), (*old_constant_dots, constant_dots_1L) = (
            tables.norm.dots_hdL,
            tables.norm.constant_dots_1L,
        )
        scale_N1L = torch.empty_like(state.scale_N1L)
        rows_NrL = state.rows_NrL.new_empty(count, rows + own + 1, places)
        rest_hdL = tables.queries.rest_hdL
        block = 64
        kernels.update[(count, -(-places // block))](
            _block_diagonal(keys_NhTd, self.dtype),
            _block_diagonal(values[-1], self.dtype),
            through_N64o,
            gram_N6464,
            constants_N65,
            cross_N64o,
            old_values_Noc,
            old_gram_Noo,
            old_constants_No,
            state.scale_N1L,
            state.rows_NrL if rows else rows_NrL,
            tables.queries.shared_hdL,
            tables.queries.shared_hdL if rest_hdL is None else rest_hdL,
            dots_hdL,
            constant_dots_1L.float(),
            old_dots[0] if old_dots else dots_hdL,
            (old_constant_dots[0] if old_constant_dots else constant_dots_1L).float(),
            tables.norm.energy_L,
            scale_N1L,
            rows_NrL,
            places,
            norm.eps,
            TOKENS=tokens,
            ROWS=rows,
            PADDED_ROWS=padded,
            CHANNELS=basis_NrC.shape[2],
            BLOCK=block,
            num_warps=4,
            num_stages=1,
            enable_fp_fusion=True,
        )
        return ImageTokens(scale_N1L, rows_NrL, basis_NrC * norm.weight)


def decoder_for(plain: FastDecoder, side: int) -> type[FastDecoder]:
    """The faster of the two on a decoder's device, which must be a GPU; the plain one where the other fails.

    Args:
        plain: With the weights, on the device.
        side: Of the embedding.

    Returns:
        The class. What was found is logged in one line.
    """
    device = plain.decoder.mask_tokens.weight.device
    name = torch.cuda.get_device_name(device)
    if torch.cuda.get_device_capability(device) < (8, 0):
        _log.info("%s has no bfloat16 products: the decoder is plain PyTorch", name)
        return FastDecoder
    try:
        with torch.cuda.device(device):
            error, plain_seconds, fused_seconds = _trial(plain, side)
    except Exception as failure:  # noqa: BLE001 (whatever compiler or driver is missing, masks need none of it)
        lines = str(failure).strip().splitlines() or [repr(failure)]
        _log.warning("no kernels for %s, the decoder is plain PyTorch: %s", name, lines[-1])
        return FastDecoder
    finally:
        torch.cuda.empty_cache()
    faster = fused_seconds <= _LARGEST_SHARE * plain_seconds
    chosen = FusedDecoder if error <= _LARGEST_ERROR and faster else FastDecoder
    _log.info(
        "%s decodes %d prompts in %.2f ms with kernels, in %.2f ms without, error %.1e: %s",
        *(name, _PROMPTS, 1e3 * fused_seconds, 1e3 * plain_seconds, error, chosen.__name__),
    )
    return chosen


@torch.inference_mode()
def _trial(plain: FastDecoder, side: int) -> tuple[float, ...]:
    """Largest error of the fused decoder, the seconds of the plain one, its own."""
    fused = FusedDecoder(plain.decoder, plain.dtype, plain.upscaling_dtype)
    weight = plain.decoder.mask_tokens.weight
    random = partial(torch.randn, device=weight.device, generator=torch.Generator(weight.device).manual_seed(0))
    embedding, positions = random(1, weight.shape[1], side, side), random(1, weight.shape[1], side, side)
    image = plain.image(embedding, torch.zeros_like(embedding), positions)
    prompts = random(_PROMPTS, plain.decoder.num_mask_tokens + 3, weight.shape[1])
    (right, right_states), (found, found_states) = (
        decoder.run(image, prompts[:_COMPARED], _COMPARED) for decoder in (plain, fused)
    )
    pairs = [(right, found)]
    for one, other in zip(right_states, found_states, strict=True):
        pairs += [(one.rows_NrL.float(), other.rows_NrL.float()), (one.scale_N1L, other.scale_N1L)]
    errors = [float((other - one).norm() / one.norm()) for one, other in pairs]
    seconds = (_seconds(partial(decoder.run, image, prompts, _PROMPTS)) for decoder in (plain, fused))
    return torch.tensor(errors).max().item(), *seconds  # NaN where one is


def _seconds(work: Callable[[], Any]) -> float:
    """The median of some rounds, with the time that the device runs on."""
    measured = []
    for _ in range(_ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        measured.append(time.perf_counter() - start)
    return statistics.median(measured)


def _kernels() -> Any:
    from pipeline.model import kernels  # noqa: PLC0415 (Triton is not on every machine)

    return kernels


def _padded(rows: int) -> int:
    """A power of two, as Triton asks, and 16 at least, as tensor cores do."""
    return max(16, 1 << (rows - 1).bit_length()) if rows else 16


def _block_diagonal(x_NhTd: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Each head's rows in columns of its own: N x 64 x hd, row 8 h + t."""
    count, heads, tokens, each = x_NhTd.shape
    blocks = x_NhTd.new_zeros(count, heads, MOST_TOKENS, heads, each, dtype=dtype)
    blocks.diagonal(dim1=1, dim2=3)[:, :tokens] = x_NhTd.permute(0, 2, 3, 1).to(dtype)
    return blocks.view(count, heads * MOST_TOKENS, heads * each)


def _by_token(x_NrK: torch.Tensor, tokens: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows h T + t to rows 8 h + t, columns to so many, with zeros: N x 64 x columns, contiguous."""
    by_head = x_NrK.reshape(len(x_NrK), _HEADS, tokens, -1)
    padded = F.pad(by_head, (0, columns - x_NrK.shape[2], 0, MOST_TOKENS - tokens))
    return padded.flatten(1, 2).to(dtype).contiguous()


def _between_tokens(x_Nrr: torch.Tensor, tokens: int, dtype: torch.dtype) -> torch.Tensor:
    """The same for rows and columns."""
    once = _by_token(x_Nrr, tokens, x_Nrr.shape[2])
    return _by_token(once.mT, tokens, once.shape[1], dtype).mT.contiguous()


def _through(x_NhTd: torch.Tensor, weight_hdC: torch.Tensor) -> torch.Tensor:
    """Each head's rows through its own part of a map: N x hT x C."""
    return torch.einsum("nhtd,hdc->nhtc", x_NhTd, weight_hdC).flatten(1, 2)
