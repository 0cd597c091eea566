"""MobileSAM's image encoder: timm's TinyViT with the last stage at stride 16, and SAM's neck.

Paper: https://arxiv.org/abs/2306.14289. What differs from timm's classifier: the last stage is not
downsampled (its merging convolution has stride 1), there is no head, and a neck brings the last stage's
channels to the 256 of SAM's decoder. Parameters keep timm's names here; `weights.published_name` translates.
"""

from typing import Any, Final, NamedTuple, cast

import torch
from segment_anything.modeling.common import LayerNorm2d
from timm.models.tiny_vit import TinyVit
from torch import nn

EMBEDDING_CHANNELS = 256
STRIDE = 16


class TinyVitShape(NamedTuple):
    """What the sizes of TinyViT, https://arxiv.org/abs/2207.10666, differ in. All have 2, 2, 6 and 2 blocks."""

    widths: tuple[int, int, int, int]
    """Channels of the stages."""
    heads: tuple[int, int, int, int]


# The numbers of timm's tiny_vit_5m_224, tiny_vit_11m_224 and tiny_vit_21m_224.
TINY_VIT_5M: Final = TinyVitShape((64, 128, 160, 320), (2, 4, 5, 10))
TINY_VIT_11M: Final = TinyVitShape((64, 128, 256, 448), (2, 4, 8, 14))
TINY_VIT_21M: Final = TinyVitShape((96, 192, 384, 576), (3, 6, 12, 18))


class TinyVitEncoder(nn.Module):
    """A TinyViT as SAM's image encoder; MobileSAM's has 5M."""

    def __init__(self, shape: TinyVitShape = TINY_VIT_5M) -> None:
        super().__init__()
        # The class, not timm.create_model: importing the original mobile_sam package replaces the models of
        # these names in timm's registry.
        body = TinyVit(
            embed_dims=shape.widths,
            depths=(2, 2, 6, 2),
            num_heads=shape.heads,
            window_sizes=(7, 7, 14, 7),
            drop_path_rate=0.0,
            num_classes=0,
        )
        self.patch_embed = body.patch_embed
        self.stages = body.stages
        last_merging: Any = self.stages[-1]
        last_merging.downsample.conv2.conv.stride = (1, 1)
        self.neck = nn.Sequential(
            nn.Conv2d(body.num_features, EMBEDDING_CHANNELS, kernel_size=1, bias=False),
            LayerNorm2d(EMBEDDING_CHANNELS),
            nn.Conv2d(EMBEDDING_CHANNELS, EMBEDDING_CHANNELS, kernel_size=3, padding=1, bias=False),
            LayerNorm2d(EMBEDDING_CHANNELS),
        )

    def forward(self, pixels_B3SS: torch.Tensor) -> torch.Tensor:
        """Normalised pixels, S x S with S a multiple of 16, to embeddings B x 256 x S/16 x S/16."""
        features = self.patch_embed(pixels_B3SS)
        for stage in self.stages:
            features = stage(features)
        if features.device.type == "cpu" and not self.training:
            # With channels last, oneDNN's sums of 2304 addends round three times as much.
            features = features.contiguous()
        return cast(torch.Tensor, self.neck(features))
