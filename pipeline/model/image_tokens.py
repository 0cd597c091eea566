"""Image tokens of many prompts of one image, and what these prompts share: the data of `decoder.py`.

N prompts, L places, C channels, h heads of d channels, r rows.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ImageTokens:
    """Image tokens of N prompts: scale * U + basisᵀ rows + c. U and c are the image's and the weights'."""

    scale_N1L: torch.Tensor
    rows_NrL: torch.Tensor
    basis_NrC: torch.Tensor

    def select(self, keep: torch.Tensor) -> "ImageTokens":
        """Those of the prompts that a bool mask names."""
        if keep.all():
            return self
        return ImageTokens(self.scale_N1L[keep], self.rows_NrL[keep], self.basis_NrC[keep])

    def __len__(self) -> int:
        return len(self.scale_N1L)


@dataclass(frozen=True)
class Projection:
    """A linear map of image tokens, as far as it is the same for all prompts; by heads."""

    weight_hdC: torch.Tensor
    shared_hdL: torch.Tensor
    """Of U; where tokens are the image's own, with the rest."""
    rest_hdL: torch.Tensor | None
    """Of c and of the positions, and the bias; None where it is part of `shared_hdL`."""


@dataclass(frozen=True)
class Norm:
    """What the normalisation after a layer needs: Y = s U + Bᵀ R + k, centred over the channels."""

    dots_hdL: tuple[torch.Tensor, ...]
    """Products with U of a basis that is made of values: those of each layer so far."""
    constant_dots_1L: tuple[torch.Tensor, ...]
    """Products with U of the constant rows: of each layer so far, k last."""
    energy_L: torch.Tensor
    """|U|²"""
    constant_C: torch.Tensor
    """k"""


@dataclass(frozen=True)
class Layer:
    """Shared tables of one layer."""

    keys: Projection
    values: Projection
    queries: Projection
    basis_hdC: torch.Tensor
    """What values of tokens become in the basis: the output projection, centred over the channels."""
    norm: Norm


@dataclass(frozen=True)
class ImageTables:
    """What all prompts of one image share."""

    layers: tuple[Layer, ...]
    keys: Projection
    """Of the last attention."""
    values: Projection
    upscaling_ioC: torch.Tensor
    """The first transposed convolution as a linear map for each of the two rows of pixels that a place becomes."""
    upscaling_shared_iLo: torch.Tensor
    """The same of U."""
    upscaling_rest_io: torch.Tensor
    """The same of c, with its bias."""
