"""SAM's mask decoder, shaped for many prompts of one image: the reference's weights and answers, less work.

`segment_anything.modeling.MaskDecoder` treats prompts as if each had an image of its own, and stores the image's
tokens, C = 256 channels at L = 4096 places, for every prompt after every step. Here a prompt's image tokens are
never stored. T tokens change them by attention in 8 heads, which is a matrix of rank 8 T, and layer normalisation
scales each place. So after any number of layers they are

    X = s U + Bᵀ R + c

with U (C x L) the image's own, the same for every prompt, c (C) the weights' own, and for each prompt a scale
s (L), rows R (r x L) and a basis B (r x C). After the first layer r is 8 T + 1, after the second 16 T + 2; the
extra rows are for the constants that a layer normalisation scales.

* A linear map of X, such as keys, values and queries, is the map of U and of c, made once an image, and that of B,
  which is small. Keys are not stored either: their products with T queries are made directly.
* X is normalised without being made. Its mean goes away when U, B and c are centred over the channels; its
  variance is |s U + Bᵀ R + c|² / C, whose parts are products of shared tables, of rows, and of B Bᵀ (r x r).
* Masks are upscaled for prompts that are wanted only, from R.

All of this is the reference's arithmetic in another order; in float32 the answers differ by rounding.

Tensors have the L places last, because every step over them is then a matrix product or a pass over contiguous
memory. N prompts, T tokens a prompt, C channels, h heads of d channels, r rows.
"""

import math
from typing import Any, Final, cast

import torch
from segment_anything.modeling import MaskDecoder
from torch.nn import functional as F

from pipeline.model.image_tokens import ImageTables, ImageTokens, Layer, Norm, Projection
from pipeline.model.products import gelu_, gelu_of_linear, products

_PLACES: Final = 2048
"""Of image tokens that are updated at a time, so that a CPU's cache holds what is made of them."""


class FastDecoder:
    """Runs a `MaskDecoder`'s weights, which it refers to and does not copy."""

    def __init__(
        self,
        decoder: MaskDecoder,
        dtype: torch.dtype = torch.float32,
        upscaling_dtype: torch.dtype = torch.float32,
    ) -> None:
        """Take the weights.

        Args:
            decoder: Of segment-anything.
            dtype: Of the transformer's arithmetic on image tokens; tokens of prompts are float32.
            upscaling_dtype: Of the arithmetic from image tokens to masks.
        """
        self.decoder, self.dtype, self.upscaling_dtype = decoder, dtype, upscaling_dtype

    @staticmethod
    def prompts_at_once() -> int:
        """Of a CPU so few that what is made of them stays in its cache, but several for each reading of tables."""
        return 4

    def image(
        self, features_1CHW: torch.Tensor, dense_1CHW: torch.Tensor, positions_1CHW: torch.Tensor
    ) -> ImageTables:
        """Prepare an image.

        Args:
            features_1CHW: Its embedding.
            dense_1CHW: Dense prompt embedding, the same for all prompts.
            positions_1CHW: Dense positional encoding.
        """
        positions_CL = positions_1CHW[0].flatten(1)
        own_CL = (features_1CHW + dense_1CHW)[0].flatten(1)  # U
        rest_C: torch.Tensor | None = None  # c; None where X is U
        layers: list[Layer] = []
        bases: list[torch.Tensor] = []  # what values become in the basis, C x hd, of each layer so far
        constants: list[torch.Tensor] = []
        for layer in self.decoder.transformer.layers:
            read, answer = layer.cross_attn_token_to_image, layer.cross_attn_image_to_token
            keys, queries = (
                self._projection(map_, read.num_heads, own_CL, rest_C, positions_CL)
                for map_ in (read.k_proj, answer.q_proj)
            )
            values = self._projection(read.v_proj, read.num_heads, own_CL, rest_C)
            output = answer.out_proj
            own_CL = _centred(own_CL)
            bases = [_centred(basis) for basis in (*bases, output.weight)]
            constants = [
                *map(_centred, constants),
                _centred(output.bias if rest_C is None else rest_C + output.bias),
            ]
            norm = Norm(
                tuple(self._by_head(basis.T @ own_CL, answer.num_heads) for basis in bases),
                tuple((constant @ own_CL)[None].to(self.dtype) for constant in constants),
                own_CL.square().sum(0),
                constants[-1],
            )
            basis_hdC = bases[-1].T.reshape(answer.num_heads, -1, len(output.weight))
            layers.append(Layer(keys, values, queries, basis_hdC, norm))
            gain_C1 = layer.norm4.weight[:, None]
            own_CL = own_CL * gain_C1
            bases = [basis * gain_C1 for basis in bases]
            constants = [constant * layer.norm4.weight for constant in constants]
            rest_C = layer.norm4.bias
        last = self.decoder.transformer.final_attn_token_to_image
        convolution, *_ = cast(Any, self.decoder.output_upscaling)
        weight_ioC, bias_o = as_linear(convolution)
        return ImageTables(
            tuple(layers),
            self._projection(last.k_proj, last.num_heads, own_CL, rest_C, positions_CL),
            self._projection(last.v_proj, last.num_heads, own_CL, rest_C),
            weight_ioC,
            (own_CL.T @ weight_ioC.mT).to(self.upscaling_dtype),
            (bias_o if rest_C is None else weight_ioC @ rest_C + bias_o).to(self.upscaling_dtype),
        )

    def run(
        self, image: ImageTables, prompts_NTC: torch.Tensor, at_once: int
    ) -> tuple[torch.Tensor, list[ImageTokens]]:
        """The two-way transformer.

        Args:
            image: Prepared.
            prompts_NTC: Output tokens and sparse prompt embeddings of N prompts.
            at_once: Prompts whose image tokens are worked on together; changes speed only.

        Returns:
            Tokens N x T x C in float32, and image tokens, of `at_once` prompts in each item.
        """
        transformer = self.decoder.transformer
        tokens = prompts_NTC
        states = [self._image_tokens(image, len(part)) for part in torch.split(tokens, at_once)]
        values: list[torch.Tensor] = []
        for layer, tables in zip(transformer.layers, image.layers, strict=True):
            mixed = tokens if layer.skip_first_layer_pe else tokens + prompts_NTC
            attended = layer.self_attn(mixed, mixed, tokens)
            tokens = layer.norm1(attended if layer.skip_first_layer_pe else tokens + attended)
            attention = layer.cross_attn_token_to_image
            read = self._read(attention, tables.keys, tables.values, tokens + prompts_NTC, states)
            tokens = layer.norm2(tokens + read)
            tokens = layer.norm3(tokens + layer.mlp(tokens))
            attention = layer.cross_attn_image_to_token
            keys = _heads(attention.k_proj(tokens + prompts_NTC), attention.num_heads)
            values.append(_heads(attention.v_proj(tokens), attention.num_heads))
            states = self._updated(layer, tables, keys, values, states)
        attention = transformer.final_attn_token_to_image
        tokens = tokens + self._read(attention, image.keys, image.values, tokens + prompts_NTC, states)
        return transformer.norm_final_attn(tokens), states

    def upscale(
        self,
        image: ImageTables,
        tokens: ImageTokens,
        weights_NMc: torch.Tensor,
        logits_NMSS: torch.Tensor,
    ) -> None:
        """Make masks from image tokens and the hypernetworks' weights.

        Args:
            image: Prepared.
            tokens: Image tokens.
            weights_NMc: One row of 32 channels a mask, M masks a prompt.
            logits_NMSS: Filled with the masks' logits, L = S/4 x S/4.
        """
        _, norm, _, last, _ = cast(Any, self.decoder.output_upscaling)
        dtype = self.upscaling_dtype
        weights_NMc, scale_NL1 = weights_NMc.to(dtype), tokens.scale_N1L.mT.to(dtype)
        by_row_iNor = [(weight_oC @ tokens.basis_NrC.mT).to(dtype) for weight_oC in image.upscaling_ioC]
        last_ioc, last_bias_o = (tensor.to(dtype) for tensor in as_linear(last))
        gain_c, bias_c = norm.weight.to(dtype), norm.bias.to(dtype)
        rows_NLr = tokens.rows_NrL.to(dtype).mT.contiguous()
        # Of the 4 x 4 pixels that a place becomes, one row at a time: the first convolution makes two, the last
        # two of each. Channels are last, so that a pixel's columns are part of its row's.
        for i, by_row_Nor in enumerate(by_row_iNor):
            first_NLo = torch.addcmul(image.upscaling_rest_io[i], scale_NL1, image.upscaling_shared_iLo[i])
            first_NLo = products(rows_NLr, by_row_Nor.mT, first_NLo)
            first_pc = first_NLo.view(-1, len(gain_c))  # p pixels of all prompts
            first_pc = gelu_(F.layer_norm(first_pc, gain_c.shape, gain_c, bias_c, norm.eps))
            for j, last_oc in enumerate(last_ioc):
                second_po = gelu_of_linear(first_pc, last_oc, last_bias_o)
                second_Nqc = second_po.view(len(tokens), -1, weights_NMc.shape[2])
                made_NMq = torch.bmm(weights_NMc, second_Nqc.mT)
                logits_NMSS[:, :, 2 * i + j :: 4] = made_NMq.view(*weights_NMc.shape[:2], -1, logits_NMSS.shape[3])

    def _projection(
        self,
        map_: Any,
        heads: int,
        own_CL: torch.Tensor,
        rest_C: torch.Tensor | None,
        positions_CL: torch.Tensor | None = None,
    ) -> Projection:
        """Tables of a linear layer on image tokens that are U, or s U + Bᵀ R + c."""
        weight, bias = map_.weight, map_.bias
        rest = bias[:, None]
        if rest_C is not None:
            rest = rest + (weight @ rest_C)[:, None]
        if positions_CL is not None:
            rest = rest + weight @ positions_CL
        shared = weight @ own_CL
        by_head = weight.view(heads, -1, weight.shape[1])
        if rest_C is None:
            return Projection(by_head, self._by_head(shared + rest, heads), None)
        return Projection(by_head, self._by_head(shared, heads), self._by_head(rest, heads))

    def _by_head(self, table: torch.Tensor, heads: int) -> torch.Tensor:
        return table.view(heads, -1, table.shape[1]).to(self.dtype)

    def _image_tokens(self, image: ImageTables, count: int) -> ImageTokens:
        """The image's own, before any layer."""
        _, places, _ = image.upscaling_shared_iLo.shape
        channels = image.keys.weight_hdC.shape[2]
        scale = torch.ones(count, 1, places, device=image.upscaling_shared_iLo.device)
        rows = scale.new_empty(count, 0, places, dtype=self.dtype)
        return ImageTokens(scale, rows, scale.new_empty(count, 0, channels))

    def _read(
        self,
        attention: Any,
        keys: Projection,
        values: Projection,
        queries_NTC: torch.Tensor,
        states: list[ImageTokens],
    ) -> torch.Tensor:
        """What tokens read from the image."""
        queries_NhTd = _heads(attention.q_proj(queries_NTC), attention.num_heads)
        queries_NhTd = queries_NhTd / math.sqrt(queries_NhTd.shape[-1])
        parts = torch.split(queries_NhTd, len(states[0]))
        read_NhTd = torch.cat(
            [self._read_some(keys, values, part, state) for part, state in zip(parts, states, strict=True)]
        )
        read: torch.Tensor = attention.out_proj(read_NhTd.transpose(1, 2).flatten(2))
        return read

    def _read_some(
        self, keys: Projection, values: Projection, queries_NhTd: torch.Tensor, state: ImageTokens
    ) -> torch.Tensor:
        through_Nor = self._through(queries_NhTd, keys, state)
        weights_hNTL = torch.softmax(self._scores(queries_NhTd, through_Nor, keys, state), dim=-1)
        shared_hLd = values.shared_hdL.mT
        if values.rest_hdL is None:
            return per_head(weights_hNTL, shared_hLd).float().transpose(0, 1)
        by_row_Nor = products(weights_hNTL.transpose(0, 1).flatten(1, 2), state.rows_NrL.mT).float()
        through_NhTC = torch.bmm(by_row_Nor, state.basis_NrC).view(*queries_NhTd.shape[:3], -1)
        read_hNTd = per_head(weights_hNTL.mul_(state.scale_N1L.to(self.dtype)), shared_hLd).float()
        read_hNTd = read_hNTd + per_head(through_NhTC.transpose(0, 1), values.weight_hdC.mT)
        return read_hNTd.transpose(0, 1) + values.rest_hdL.mT

    def _scores(
        self,
        tokens_NhTd: torch.Tensor,
        through_Nor: torch.Tensor | None,
        projection: Projection,
        state: ImageTokens,
        strip: slice = slice(None),
    ) -> torch.Tensor:
        """Products of tokens with projected image tokens at some places, h x N x T x places.

        Args:
            tokens_NhTd: By heads.
            through_Nor: What `_through` makes of these.
            projection: Of the image tokens.
            state: The image tokens.
            strip: The places.
        """
        count, heads, length, _ = tokens_NhTd.shape
        few_hod = tokens_NhTd.transpose(0, 1).flatten(1, 2).to(self.dtype)  # o tokens of all prompts
        scores_hoL = torch.bmm(few_hod, projection.shared_hdL[:, :, strip])
        scores_hNTL = scores_hoL.view(heads, count, length, -1)
        if projection.rest_hdL is None or through_Nor is None:
            return scores_hNTL
        scores_hNTL.mul_(state.scale_N1L[:, :, strip].to(self.dtype))
        scores_hoL.baddbmm_(few_hod, projection.rest_hdL[:, :, strip])
        by_row_NoL = products(through_Nor.to(self.dtype), state.rows_NrL[:, :, strip])
        return scores_hNTL.add_(by_row_NoL.view(count, heads, length, -1).transpose(0, 1))

    def _through(
        self, tokens_NhTd: torch.Tensor, projection: Projection, state: ImageTokens
    ) -> torch.Tensor | None:
        """Products of tokens with the projected basis, N x hT x r; None where there are no rows yet."""
        if projection.rest_hdL is None:
            return None
        through_hNTC = per_head(tokens_NhTd.transpose(0, 1), projection.weight_hdC)
        return torch.bmm(through_hNTC.transpose(0, 1).flatten(1, 2), state.basis_NrC.mT)

    def _updated(
        self,
        layer: Any,
        tables: Layer,
        keys_NhTd: torch.Tensor,
        values: list[torch.Tensor],
        states: list[ImageTokens],
    ) -> list[ImageTokens]:
        """Image tokens after they have read from the tokens, normalised; `values` of each layer so far."""
        keys_NhTd = keys_NhTd / math.sqrt(keys_NhTd.shape[-1])
        parts = zip(*(torch.split(tensor, len(states[0])) for tensor in (keys_NhTd, *values)), strict=True)
        return [
            self._updated_some(layer.norm4, tables, state, keys, few)
            for state, (keys, *few) in zip(states, parts, strict=True)
        ]

    def _updated_some(
        self, norm: Any, tables: Layer, state: ImageTokens, keys_NhTd: torch.Tensor, values: list[torch.Tensor]
    ) -> ImageTokens:
        through_Nor = self._through(keys_NhTd, tables.queries, state)
        basis_NrC = self._basis(tables, state, values[-1])
        gram_Nrr = torch.bmm(basis_NrC, basis_NrC.mT).to(self.dtype)
        values_hNTd = [few_NhTd.transpose(0, 1).to(self.dtype) for few_NhTd in values]
        old, places = state.rows_NrL.shape[1:]
        rows_NrL = state.rows_NrL.new_empty(*basis_NrC.shape[:2], places)
        scale_N1L = torch.empty_like(state.scale_N1L)
        for start in range(0, places, _PLACES):
            strip = slice(start, start + _PLACES)
            before_N1l = state.scale_N1L[:, :, strip]
            scores_hNTl = self._scores(keys_NhTd, through_Nor, tables.queries, state, strip)
            few_Nrl = rows_NrL[:, :, strip]
            few_Nrl[:, :old] = state.rows_NrL[:, :, strip]
            new_NhTl = torch.unflatten(few_Nrl[:, old:-1], 1, keys_NhTd.shape[1:3])
            new_NhTl.copy_(scores_hNTl.softmax(dim=2).transpose(0, 1))
            few_Nrl[:, -1] = 1
            # |Y|² of Y = s U + Bᵀ R: s² |U|², and for each row R times 2 s B U + B Bᵀ R.
            products_Nrl = products(gram_Nrr, few_Nrl)
            twice_N1l = 2 * before_N1l.to(self.dtype)
            first = 0
            for few_hNTd, dots_hdL, constant_dots_1L in zip(
                values_hNTd, tables.norm.dots_hdL, tables.norm.constant_dots_1L, strict=True
            ):
                shared_NhTl = per_head(few_hNTd, dots_hdL[:, :, strip]).transpose(0, 1)
                last = first + shared_NhTl.shape[1] * shared_NhTl.shape[2]
                by_head_NhTl = torch.unflatten(products_Nrl[:, first:last], 1, shared_NhTl.shape[1:3])
                by_head_NhTl.addcmul_(twice_N1l[:, None], shared_NhTl)
                products_Nrl[:, last].addcmul_(twice_N1l[:, 0], constant_dots_1L[:, strip])
                first = last + 1
            energy_N1l = products_Nrl.mul_(few_Nrl).sum(1, keepdim=True, dtype=torch.float32)
            energy_N1l += tables.norm.energy_L[strip] * before_N1l.square()
            after_N1l = energy_N1l.clamp_(min=0).div_(basis_NrC.shape[2]).add_(norm.eps).rsqrt_()
            scale_N1L[:, :, strip] = before_N1l * after_N1l
            few_Nrl.mul_(after_N1l.to(self.dtype))
        return ImageTokens(scale_N1L, rows_NrL, basis_NrC * norm.weight)

    def _basis(self, tables: Layer, state: ImageTokens, values_NhTd: torch.Tensor) -> torch.Tensor:
        """B of Y, N x r x C: the rows so far, those of values, the constant."""
        own_NrC = per_head(values_NhTd.transpose(0, 1), tables.basis_hdC).transpose(0, 1).flatten(1, 2)
        constant_N1C = tables.norm.constant_C.expand(len(values_NhTd), 1, -1)
        return torch.cat([_centred(state.basis_NrC, 2), own_NrC, constant_N1C], dim=1)


def _heads(x_NTi: torch.Tensor, heads: int) -> torch.Tensor:
    """N x T x hd to N x h x T x d."""
    return x_NTi.view(*x_NTi.shape[:2], heads, -1).transpose(1, 2)


def per_head(x_hNTi: torch.Tensor, table_hij: torch.Tensor) -> torch.Tensor:
    """Each head's rows times its own matrix, the same for all prompts: h x N x T x j."""
    product = torch.bmm(x_hNTi.flatten(1, 2), table_hij)
    return product.view(*x_hNTi.shape[:3], -1)


def _centred(x: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """Minus the mean over the channels."""
    return x - x.mean(dim, keepdim=True)


def as_linear(convolution: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A transposed convolution of kernel 2 and stride 2 as two linear maps, one for each row of pixels.

    Returns:
        Weights 2 x o x channels and the bias (o), which is that of both; o is the two pixels of the row, with all
        channels each.
    """
    return convolution.weight.permute(2, 3, 1, 0).flatten(1, 2), convolution.bias.repeat(2)
