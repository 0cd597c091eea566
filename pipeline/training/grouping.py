"""An auxiliary objective: pixels of one segment are alike, pixels of different segments are not.

A click teaches the encoder through the whole of the mask decoder, eight times a picture; as long as the decoder
cannot read the features yet, masks are blobs about the click, and the features learn little. This objective asks
the upscaled features themselves, at many random pixels (anchors), which other pixels belong to the same segment.
It needs no prompt and no attention, so it costs a fraction of a click.

In the manner of learned pixel affinities and embeddings (Fathi et al. 2017, https://arxiv.org/abs/1703.10277). How
far a segment reaches is predicted apart from what it looks like, so features need not say where they are: that
is what the decoder has positional encodings for.
"""

from typing import Final

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from pipeline.training.examples import Batch

Losses = dict[str, torch.Tensor]
_CHANNELS: Final = 32  # of the upscaled features
_DISTANCE_SCALE: Final = 10.0


class Grouping(nn.Module):
    """The objective, with a small head of its own, which is no part of the model."""

    def __init__(self, anchors: int = 96, seed: int = 0) -> None:
        """Begin.

        Args:
            anchors: Pixels a picture that are asked about.
            seed: Decides them, with the batch's number.
        """
        super().__init__()
        self._anchors, self._seed = anchors, seed
        self.head = nn.Sequential(nn.Linear(_CHANNELS, 128), nn.GELU(), nn.Linear(128, _CHANNELS + 2))

    def forward(self, upscaled_Bcss: torch.Tensor, batch: Batch, number: int) -> Losses:
        """Losses of a batch.

        Args:
            upscaled_Bcss: What the decoder's `output_upscaling` makes of the batch's embeddings, 32 channels.
            batch: With masks; pixels that are in none of them are not asked about.
            number: Of the batch; decides the anchors, with the seed.

        Returns:
            `grouping`, to be minimised: cross entropy plus half of the dice loss, between each anchor's
            affinities and the mean of the masks that it lies in. `grouping_miou`: how good the affinities are as
            masks, thresholded, against the best of those masks.
        """
        pixels_BLc = upscaled_Bcss.float().flatten(2).transpose(1, 2)
        pictures, length, _ = pixels_BLc.shape
        rng = np.random.default_rng([self._seed, number])
        anchors_BA = torch.from_numpy(rng.integers(0, length, (pictures, self._anchors))).to(pixels_BLc.device)
        rows_B1 = torch.arange(pictures, device=pixels_BLc.device)[:, None]

        answers = self.head(pixels_BLc[rows_B1, anchors_BA]).float()
        query_BAc, offset_BA1, reach_BA1 = answers.split([_CHANNELS, 1, 1], dim=-1)
        distance_BAL = _squared_distances(anchors_BA, upscaled_Bcss.shape[-1])
        logits_BAL = query_BAc @ pixels_BLc.transpose(1, 2) + offset_BA1
        logits_BAL = logits_BAL - _DISTANCE_SCALE * F.softplus(reach_BA1) * distance_BAL

        masks_BNL = (batch.masks_BNss.flatten(2) > 127).float()
        under_BAN = masks_BNL.transpose(1, 2)[rows_B1, anchors_BA]
        count_BA1 = under_BAN.sum(-1, keepdim=True)
        target_BAL = matmul_float32(under_BAN, masks_BNL) / count_BA1.clamp(min=1)
        asked_BA = (count_BA1[..., 0] > 0).float()

        entropy_BA = F.binary_cross_entropy_with_logits(logits_BAL, target_BAL, reduction="none").mean(-1)
        probability_BAL = logits_BAL.sigmoid()
        overlap_BA = 2 * (probability_BAL * target_BAL).sum(-1) + 1
        dice_BA = 1 - overlap_BA / (probability_BAL.square().sum(-1) + target_BAL.square().sum(-1) + 1)
        total = asked_BA.sum().clamp(min=1)
        with torch.no_grad():
            covered_BAL = (logits_BAL > 0).float()
            both_BAN = matmul_float32(covered_BAL, masks_BNL.transpose(1, 2))
            either_BAN = covered_BAL.sum(-1, keepdim=True) + masks_BNL.sum(-1)[:, None] - both_BAN
            best_BA = (both_BAN / either_BAN.clamp(min=1) * under_BAN).amax(-1)
        return {
            "grouping": ((entropy_BA + dice_BA / 2) * asked_BA).sum() / total,
            "grouping_miou": (best_BA * asked_BA).sum() / total,
        }


def matmul_float32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The product in float32, also under autocast: bfloat16 rounds a count of pixels from 257 on."""
    with torch.autocast(a.device.type, enabled=False):
        return a.float() @ b.float()


def _squared_distances(anchors_BA: torch.Tensor, side: int) -> torch.Tensor:
    """From anchors to all pixels of a square of side 1 with side x side pixels, B x A x L."""
    pixel = torch.arange(side * side, device=anchors_BA.device)
    place_L2 = torch.stack([pixel // side, pixel % side], dim=-1).float() / side
    return (place_L2[anchors_BA][:, :, None] - place_L2).square().sum(-1)
