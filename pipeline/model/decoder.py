"""SAM's mask decoder, shaped for many prompts of one image: the reference's weights and answers, less work.

`segment_anything.modeling.MaskDecoder` treats prompts as if each had an image of its own. Here

* what the first layer makes of the image alone is made once: keys and values for the tokens, and the queries
  that they answer;
* the image's update by T tokens in 8 heads is a matrix of rank 8 T: softmax weights (L x 8T) times the tokens'
  values, already through the output projection (8T x 256);
* the three projections of an image token in the second layer are one, and those of its position come from a table;
* upscaling is a chain of matrix products on tokens, for masks that are wanted only.

Every attention is a pair of matrix products over all heads at once: the tokens' side is laid out block by block,
so that a head sees only its own channels. That multiplies some zeros, and is faster than eight thin products.

L image tokens, T tokens a prompt, C = 256 channels, N prompts.
"""

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from segment_anything.modeling import MaskDecoder
from torch.nn import functional as F


@dataclass(frozen=True)
class Image:
    """What all prompts of one image share."""

    tokens_LC: torch.Tensor
    """Embedding and dense prompt embedding."""
    keys_Li: torch.Tensor
    """Of the first layer's attention from tokens to image; i = 128 channels of all heads."""
    values_Li: torch.Tensor
    queries_Li: torch.Tensor
    """Of the first layer's attention from image to tokens."""


class FastDecoder:
    """Runs a `MaskDecoder`'s weights, which it refers to and does not copy."""

    def __init__(self, decoder: MaskDecoder, dtype: torch.dtype = torch.float32) -> None:
        """Take the weights.

        Args:
            decoder: Of segment-anything, with two layers.
            dtype: Of the arithmetic on image tokens; tokens of prompts are float32.
        """
        self._decoder, self._dtype = decoder, dtype

    def image(self, features_1CHW: torch.Tensor, dense_1CHW: torch.Tensor, positions_1CHW: torch.Tensor) -> Image:
        """Prepare an image.

        Args:
            features_1CHW: Its embedding.
            dense_1CHW: Dense prompt embedding, the same for all prompts.
            positions_1CHW: Dense positional encoding.
        """
        layer = self._layers[0]
        tokens_LC = (features_1CHW + dense_1CHW)[0].flatten(1).T.to(self._dtype)
        with_positions = tokens_LC + positions_1CHW[0].flatten(1).T.to(self._dtype)
        to_image, to_tokens = layer.cross_attn_token_to_image, layer.cross_attn_image_to_token
        return Image(
            tokens_LC,
            self._linear(to_image.k_proj, with_positions),
            self._linear(to_image.v_proj, tokens_LC),
            self._linear(to_tokens.q_proj, with_positions),
        )

    def run(
        self, image: Image, positions_LC: torch.Tensor, prompts_NTC: torch.Tensor, at_once: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The two-way transformer.

        Args:
            image: Prepared.
            positions_LC: Dense positional encoding.
            prompts_NTC: Output tokens and sparse prompt embeddings of N prompts.
            at_once: Prompts whose image tokens are worked on together; changes speed only.

        Returns:
            Tokens N x T x C in float32, and image tokens N x L x C, as `TwoWayTransformer` returns them.
        """
        image_NLC = image.tokens_LC.new_empty(len(prompts_NTC), *image.tokens_LC.shape)
        tokens_NTC = torch.empty_like(prompts_NTC)
        for start in range(0, len(prompts_NTC), at_once):
            part = slice(start, start + at_once)
            tokens_NTC[part], image_NLC[part] = self._run(image, positions_LC, prompts_NTC[part])
        return tokens_NTC, image_NLC

    def _run(
        self, image: Image, positions_LC: torch.Tensor, prompts_NTC: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = self._layers
        transformer = self._decoder.transformer
        tokens = first.norm1(first.self_attn(prompts_NTC, prompts_NTC, prompts_NTC))
        attention = first.cross_attn_token_to_image
        tokens = self._attend(attention, tokens, prompts_NTC, image.keys_Li, image.values_Li)
        tokens = first.norm3((tokens := first.norm2(tokens)) + first.mlp(tokens))
        keys_NLC = self._updated(first, image.queries_Li, tokens, prompts_NTC, image.tokens_LC)

        attention, answer = second.cross_attn_token_to_image, second.cross_attn_image_to_token
        width = attention.k_proj.out_features
        projected = self._projected(keys_NLC, positions_LC, attention.k_proj, answer.q_proj, attention.v_proj)
        keys_NLi, queries_NLi, values_NLi = torch.split(projected, width, dim=-1)
        mixed = tokens + prompts_NTC
        tokens = second.norm1(tokens + second.self_attn(mixed, mixed, tokens))
        tokens = self._attend(attention, tokens, prompts_NTC, keys_NLi, values_NLi)
        tokens = second.norm3((tokens := second.norm2(tokens)) + second.mlp(tokens))
        keys_NLC = self._updated(second, queries_NLi, tokens, prompts_NTC, keys_NLC)

        attention = transformer.final_attn_token_to_image
        projected = self._projected(keys_NLC, positions_LC, attention.k_proj, attention.v_proj)
        keys_NLi, values_NLi = torch.split(projected, width, dim=-1)
        tokens = self._attend(attention, tokens, prompts_NTC, keys_NLi, values_NLi)
        return transformer.norm_final_attn(tokens), keys_NLC

    def upscaled(self, image_NLC: torch.Tensor, weights_NMc: torch.Tensor, side: int) -> torch.Tensor:
        """Masks from image tokens and the hypernetworks' weights.

        Args:
            image_NLC: Of `run`; L = side x side.
            weights_NMc: One row of 32 channels a mask, M masks a prompt.
            side: Of the embedding.

        Returns:
            Logits N x M x 4 side x 4 side, float32.
        """
        convolution, norm, activation, last, _ = cast(Any, self._decoder.output_upscaling)
        first_NLpd = self._transposed(convolution, image_NLC)
        normed = _layer_norm(first_NLpd, norm)
        second_NLpqc = activation(self._transposed(last, activation(normed)))
        count, masks = weights_NMc.shape[:2]
        flat = second_NLpqc.flatten(1, 3)
        logits = torch.bmm(weights_NMc.to(self._dtype), flat.transpose(1, 2)).float()
        # Image tokens y, x; then the pixel of a token, and the pixel of that pixel, each as y, x.
        grid = logits.view(count, masks, side, side, 2, 2, 2, 2)
        return grid.permute(0, 1, 2, 4, 6, 3, 5, 7).reshape(count, masks, 4 * side, 4 * side)

    @property
    def _layers(self) -> Any:
        return self._decoder.transformer.layers

    def _linear(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, layer.weight.to(self._dtype), layer.bias.to(self._dtype))

    def _projected(self, keys_NLC: torch.Tensor, positions_LC: torch.Tensor, *layers: Any) -> torch.Tensor:
        """Several projections of image tokens at once; all but the last also of their positions."""
        weight = torch.cat([layer.weight for layer in layers])
        table = torch.cat(
            [F.linear(positions_LC, layer.weight, layer.bias) for layer in layers[:-1]]
            + [layers[-1].bias.expand(len(positions_LC), -1)],
            dim=1,
        )
        return (keys_NLC @ weight.T.to(self._dtype)).add_(table.to(self._dtype))

    def _attend(
        self,
        attention: Any,
        tokens_NTC: torch.Tensor,
        positions_NTC: torch.Tensor,
        keys_Li: torch.Tensor,
        values_Li: torch.Tensor,
    ) -> torch.Tensor:
        """Tokens plus what they read from the image, whose keys and values may be one prompt's (N x L x i)."""
        heads = attention.num_heads
        queries_NTi = attention.q_proj(tokens_NTC + positions_NTC)
        count, length, width = queries_NTi.shape
        scale = 1 / math.sqrt(width // heads)
        blocks_Nri = _in_blocks(queries_NTi * scale, heads).to(self._dtype)
        weights_NrL = torch.softmax(torch.matmul(blocks_Nri, keys_Li.transpose(-1, -2)), dim=-1)
        read_Nri = torch.matmul(weights_NrL, values_Li).float()
        own_NTdh = read_Nri.view(count, heads, length, heads, width // heads).diagonal(dim1=1, dim2=3)
        attended: torch.Tensor = attention.out_proj(own_NTdh.transpose(2, 3).flatten(2))
        return tokens_NTC + attended

    def _updated(
        self,
        layer: Any,
        queries_Li: torch.Tensor,
        tokens_NTC: torch.Tensor,
        positions_NTC: torch.Tensor,
        image_LC: torch.Tensor,
    ) -> torch.Tensor:
        """Image tokens N x L x C after they have read from the tokens, normalised."""
        attention = layer.cross_attn_image_to_token
        heads = attention.num_heads
        keys_NTi = attention.k_proj(tokens_NTC + positions_NTC)
        scale = 1 / math.sqrt(keys_NTi.shape[2] // heads)
        blocks_Nri = _in_blocks(keys_NTi * scale, heads).to(self._dtype)
        scores_NLr = torch.matmul(queries_Li, blocks_Nri.transpose(1, 2))
        by_head = scores_NLr.view(*scores_NLr.shape[:2], heads, -1)
        weights_NLr = torch.softmax(by_head, dim=-1).flatten(2)
        # Each head's values times its own columns of the output projection: 8T x C.
        values_NTi = attention.v_proj(tokens_NTC)
        through_NrC = _in_blocks(values_NTi, heads) @ attention.out_proj.weight.T
        update = torch.matmul(weights_NLr, through_NrC.to(self._dtype))
        update += image_LC
        update += attention.out_proj.bias.to(self._dtype)
        return _layer_norm(update, layer.norm4)

    def _transposed(self, convolution: Any, x: torch.Tensor) -> torch.Tensor:
        """A transposed convolution of kernel 2 and stride 2, token by token: ... x C to ... x 4 x c."""
        weight = convolution.weight  # C c 2 2
        columns = weight.permute(2, 3, 1, 0).flatten(0, 2).to(self._dtype)  # (2 2 c) C
        y = F.linear(x, columns, convolution.bias.repeat(4).to(self._dtype))
        return y.view(*y.shape[:-1], 4, weight.shape[1])


def _in_blocks(x_NTi: torch.Tensor, heads: int) -> torch.Tensor:
    """N x T x i to N x (heads T) x i: row h T + t has the channels of head h of token t, and zeros elsewhere."""
    count, length, width = x_NTi.shape
    blocks = x_NTi.new_zeros(count, heads, length, heads, width // heads)
    blocks.diagonal(dim1=1, dim2=3).copy_(x_NTi.view(count, length, heads, -1).transpose(2, 3))
    return blocks.view(count, heads * length, width)


def _layer_norm(x: torch.Tensor, norm: Any) -> torch.Tensor:
    """Over the last dimension, with the weights of a `LayerNorm` or a `LayerNorm2d`."""
    return F.layer_norm(x, x.shape[-1:], norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)
