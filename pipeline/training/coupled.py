"""SAM's own training: encoder and decoder together, from prompts and masks.

Paper: https://arxiv.org/abs/2304.02643, appendix A. A single click is ambiguous, so three masks are made and only
the best of them is corrected; focal and dice loss are weighed 20 : 1; the IoU head learns by mean squared error.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from pipeline.model.sam import PIXEL_MEAN, PIXEL_STD, SamModel
from pipeline.training.examples import Batch
from pipeline.training.grouping import Grouping, matmul_float32

Losses = dict[str, torch.Tensor]
PromptKind = Literal["point", "box"]


class Coupled(nn.Module):
    """The objective: a batch in, losses out. `loss` among them is what is minimised."""

    def __init__(
        self,
        model: SamModel,
        *,
        box_share: float = 0.0,
        corrective_clicks: int = 0,
        grouping: float = 0.0,
        grouping_alone: int = 0,
        seed: int = 0,
    ) -> None:
        """Take the model to train.

        Args:
            model: Is changed.
            box_share: Of the batches that are prompted with boxes instead of clicks, evenly spread.
            corrective_clicks: Rounds in which each prompt gets one more click where its mask was wrong.
            grouping: Weight of the auxiliary objective `Grouping`; 0 leaves it out.
            grouping_alone: Number of the batch before which that is the only objective.
            seed: Of the pixels that `Grouping` asks about.
        """
        super().__init__()
        self.model = model
        self._box_share, self._corrective_clicks = box_share, corrective_clicks
        self._grouping_weight, self._grouping_alone = grouping, grouping_alone
        self.grouping = Grouping(seed=seed) if grouping else None

    def forward(self, batch: Batch, number: int) -> Losses:
        """Losses of a batch; its number decides between clicks and boxes."""
        features = self.model.image_encoder(normalised(batch.pixels_B3SS))
        if self.grouping is None:
            return self._prompted(features, batch, number)
        upscaled = self.model.mask_decoder.output_upscaling(features)
        grouped = self.grouping(upscaled, batch, number)
        if number < self._grouping_alone:
            return {"loss": grouped["grouping"], **_detached(grouped)}
        losses = self._prompted(features, batch, number)
        losses["loss"] = losses["loss"] + self._grouping_weight * grouped["grouping"]
        return losses | _detached(grouped)

    def _prompted(self, features: torch.Tensor, batch: Batch, number: int) -> Losses:
        prompts = Prompts.first(batch, prompt_kind(number, self._box_share))
        logits, iou = decode(self.model, features, prompts)
        losses = mask_losses(logits, iou, batch)
        for _ in range(self._corrective_clicks):
            prompts = prompts.corrected(logits, batch)
            logits, iou = decode(self.model, features, prompts)
            again = mask_losses(logits, iou, batch)
            losses = {name: losses[name] + again[name] for name in losses}
        rounds = 1 + self._corrective_clicks
        return {name: value / rounds for name, value in losses.items()}


def prompt_kind(number: int, box_share: float) -> PromptKind:
    """Of the batch of a number: of the first n batches, `box_share` times n get boxes, rounded down."""
    return "box" if int((number + 1) * box_share) > int(number * box_share) else "point"


def _detached(losses: Losses) -> Losses:
    return {name: value.detach() for name, value in losses.items()}


@dataclass(frozen=True)
class Prompts:
    """P prompts for each of B pictures, of K points each, or of a box."""

    points_BPK2: torch.Tensor
    labels_BPK: torch.Tensor
    """1 on the thing, 0 off it."""
    boxes_BP4: torch.Tensor | None
    logits_BPss: torch.Tensor | None
    """What the last round made of them."""

    @classmethod
    def first(cls, batch: Batch, kind: PromptKind) -> "Prompts":
        """One click, or a box."""
        points = batch.points_BP2[:, :, None]
        if kind == "box":
            points = points[:, :, :0]
        labels = torch.ones(points.shape[:3], dtype=torch.int64, device=points.device)
        return cls(points, labels, batch.boxes_BP4 if kind == "box" else None, None)

    @property
    def ambiguous(self) -> bool:
        """Whether several masks answer them: a single click does not say what it means."""
        return self.boxes_BP4 is None and self.points_BPK2.shape[2] == 1

    @torch.no_grad()
    def corrected(self, logits_BPMss: torch.Tensor, batch: Batch) -> "Prompts":
        """With one more click each, in the middle of the largest difference between mask and target."""
        target = _targets(batch)
        best = _best(logits_BPMss, target)
        wrong = (best > 0) != (target > 0.5)
        # The pixel with most wrong pixels about it; where all is right, the mask's own middle.
        weight = torch.where(wrong.flatten(2).any(-1)[..., None, None], wrong, target > 0.5).float()
        side = weight.shape[-1]
        smooth = F.avg_pool2d(weight, max(3, side // 8) | 1, 1, max(3, side // 8) // 2) * weight
        place = smooth.flatten(2).argmax(-1)
        scale = batch.pixels_B3SS.shape[-1] / side
        point = torch.stack([place % side, place // side], dim=-1).float().add(0.5).mul(scale)
        label = target.flatten(2).gather(2, place[..., None]).squeeze(2).gt(0.5).long()
        return Prompts(
            torch.cat([self.points_BPK2, point[:, :, None]], dim=2),
            torch.cat([self.labels_BPK, label[:, :, None]], dim=2),
            self.boxes_BP4,
            best.detach(),
        )


def normalised(pixels_B3SS: torch.Tensor) -> torch.Tensor:
    """uint8 RGB to what the encoder takes."""
    mean, std = (
        torch.tensor(channel, device=pixels_B3SS.device).view(3, 1, 1) for channel in (PIXEL_MEAN, PIXEL_STD)
    )
    return (pixels_B3SS - mean) / std


def decode(model: SamModel, features_BCHW: torch.Tensor, prompts: Prompts) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks for the prompts of several pictures, with gradients.

    Returns:
        Logits B x P x M x S/4 x S/4 and predicted IoU B x P x M. M is 3 for a single click, else 1, as
        `segment_anything.modeling.MaskDecoder` answers.
    """
    pictures, count = prompts.points_BPK2.shape[:2]
    decoder, encoder = model.mask_decoder, model.prompt_encoder
    points, labels = prompts.points_BPK2.flatten(0, 1), prompts.labels_BPK.flatten(0, 1)
    boxes = None if prompts.boxes_BP4 is None else prompts.boxes_BP4.flatten(0, 1)
    masks = None if prompts.logits_BPss is None else prompts.logits_BPss.flatten(0, 1)[:, None]
    sparse, dense = encoder(points=(points, labels) if points.shape[1] else None, boxes=boxes, masks=masks)
    output = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([output.expand(len(sparse), -1, -1), sparse], dim=1)
    image = features_BCHW.repeat_interleave(count, dim=0) + dense
    positions = encoder.get_dense_pe().expand(len(image), -1, -1, -1)
    hidden, image_tokens = decoder.transformer(image, positions, tokens)
    upscaled = decoder.output_upscaling(image_tokens.transpose(1, 2).reshape(image.shape))
    wanted = range(1, decoder.num_mask_tokens) if prompts.ambiguous else range(1)
    weights = torch.stack([decoder.output_hypernetworks_mlps[i](hidden[:, 1 + i]) for i in wanted], dim=1)
    logits = (weights @ upscaled.flatten(2)).float().unflatten(2, upscaled.shape[-2:])
    iou = decoder.iou_prediction_head(hidden[:, 0])[:, list(wanted)].float()
    return logits.unflatten(0, (pictures, count)), iou.unflatten(0, (pictures, count))


def mask_losses(logits_BPMss: torch.Tensor, iou_BPM: torch.Tensor, batch: Batch) -> Losses:
    """Focal, dice and IoU losses, and `miou`: how good the best masks are.

    The IoU head is to predict a mask's IoU with what was asked for. Where three masks answer a single click, which
    does not say what it means, that is the best of the picture's masks under the click: a part is no wrong answer
    to a click on the whole.
    """
    target_BPss = _targets(batch)
    target = target_BPss[:, :, None].expand_as(logits_BPMss)
    focal = focal_loss(logits_BPMss, target)
    dice = dice_loss(logits_BPMss, target)
    chosen = (20 * focal + dice).detach().argmin(dim=2, keepdim=True)
    with torch.no_grad():
        covered = logits_BPMss > 0
        own = _iou(covered, target > 0.5)
        ambiguous = covered.shape[2] > 1
        actual = _best_iou_under_click(covered, batch) if ambiguous else own
    focal, dice = (value.gather(2, chosen).mean() for value in (focal, dice))
    iou_loss = F.mse_loss(iou_BPM, actual)
    return {
        "loss": 20 * focal + dice + iou_loss,
        "focal": focal.detach(),
        "dice": dice.detach(),
        "iou": iou_loss.detach(),
        "miou": own.amax(dim=2).mean(),
    }


def focal_loss(logits: torch.Tensor, target: torch.Tensor, gamma: float = 2.0) -> torch.Tensor:
    """Lin et al. 2017 (https://arxiv.org/abs/1708.02002), the mean over the last two dimensions.

    Targets are shares from 0 to 1: a pixel on an edge is partly covered.
    """
    cross_entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return ((logits.sigmoid() - target).abs() ** gamma * cross_entropy).mean(dim=(-2, -1))


def dice_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Milletari et al. 2016 (https://arxiv.org/abs/1606.04797), over the last two dimensions, 0 to 1."""
    probability = logits.sigmoid()
    overlap = 2 * (probability * target).sum(dim=(-2, -1)) + 1
    return 1 - overlap / (probability.sum(dim=(-2, -1)) + target.sum(dim=(-2, -1)) + 1)


def _targets(batch: Batch) -> torch.Tensor:
    """B x P x S/4 x S/4, 0 to 1."""
    pictures = torch.arange(len(batch.targets_BP), device=batch.targets_BP.device)[:, None]
    return batch.masks_BNss[pictures, batch.targets_BP].float() / 255


def _best(logits_BPMss: torch.Tensor, target_BPss: torch.Tensor) -> torch.Tensor:
    best = _iou(logits_BPMss > 0, target_BPss[:, :, None] > 0.5).argmax(dim=2)
    pictures, prompts = best.shape
    rows = torch.arange(pictures, device=best.device)[:, None]
    return logits_BPMss[rows, torch.arange(prompts, device=best.device), best]


def _iou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    both, either = (a & b).sum(dim=(-2, -1)), (a | b).sum(dim=(-2, -1))
    return both / either.clamp(min=1)


def _best_iou_under_click(covered_BPMss: torch.Tensor, batch: Batch) -> torch.Tensor:
    """B x P x M: the highest IoU with any mask of the picture that the click lies on, at least with its own."""
    masks = batch.masks_BNss > 127
    flat = masks.flatten(2).float()
    mine = covered_BPMss.flatten(3).float()
    both = matmul_float32(mine.flatten(1, 2), flat.transpose(1, 2)).view(*mine.shape[:3], -1)
    either = mine.sum(-1)[..., None] + flat.sum(-1)[:, None, None] - both
    iou = both / either.clamp(min=1)
    side = masks.shape[-1]
    cell = (batch.points_BP2 / 4).long().clamp(0, side - 1)
    index = cell[..., 1] * side + cell[..., 0]
    under = flat.gather(2, index[:, None].expand(-1, flat.shape[1], -1)).transpose(1, 2) > 0  # B x P x N
    under = under | F.one_hot(batch.targets_BP, flat.shape[1]).bool()
    return (iou * under[:, :, None]).amax(dim=-1)
