"""SAM's own training: encoder and decoder together, from prompts and masks.

Paper: https://arxiv.org/abs/2304.02643, appendix A. A single click is ambiguous, so three masks are made, and for
each mask under it only the nearest of them is corrected; focal and dice loss are weighed 20 : 1; the IoU head
learns by mean squared error.
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
        pictures = torch.arange(len(batch.targets_BP), device=batch.targets_BP.device)[:, None]
        target = batch.masks_BNss[pictures, batch.targets_BP] > 127
        best = _best(logits_BPMss, target)
        wrong = (best > 0) != target
        # The pixel with most wrong pixels about it; where all is right, the mask's own middle.
        weight = torch.where(wrong.flatten(2).any(-1)[..., None, None], wrong, target).float()
        side = weight.shape[-1]
        smooth = F.avg_pool2d(weight, max(3, side // 8) | 1, 1, max(3, side // 8) // 2) * weight
        place = smooth.flatten(2).argmax(-1)
        scale = batch.pixels_B3SS.shape[-1] / side
        point = torch.stack([place % side, place // side], dim=-1).float().add(0.5).mul(scale)
        label = target.flatten(2).gather(2, place[..., None]).squeeze(2).long()
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

    A single click does not say what it means. So each of the picture's masks under it is a right answer, and the
    three masks are to hold all of them: for each, that one of the three is corrected which is nearest. A prompt's
    loss is the mean over the masks under it. SAM's training draws one of them at a time; this is what it expects,
    and costs no more decoding. With a box or several clicks, one mask answers what was asked for.

    The IoU head is to predict a mask's IoU with the best of the right answers: a part is no wrong answer to a
    click on the whole.
    """
    ambiguous = logits_BPMss.shape[2] > 1
    asked_BPN = _under_click(batch) if ambiguous else _targets(batch)
    focal_BPMN, dice_BPMN = pairwise_losses(logits_BPMss, batch.masks_BNss.float() / 255)
    chosen = (20 * focal_BPMN + dice_BPMN).detach().argmin(dim=2, keepdim=True)
    focal, dice = (
        _mean_of_asked(losses.gather(2, chosen).squeeze(2), asked_BPN) for losses in (focal_BPMN, dice_BPMN)
    )
    with torch.no_grad():
        iou_BPMN = _pairwise_iou(logits_BPMss > 0, batch.masks_BNss > 127)
        actual_BPM = (iou_BPMN * asked_BPN[:, :, None]).amax(dim=3)
        miou = _mean_of_asked(iou_BPMN.amax(dim=2), asked_BPN)
    iou_loss = F.mse_loss(iou_BPM, actual_BPM)
    return {
        "loss": 20 * focal + dice + iou_loss,
        "focal": focal.detach(),
        "dice": dice.detach(),
        "iou": iou_loss.detach(),
        "miou": miou,
    }


def pairwise_losses(
    logits_BPMss: torch.Tensor, masks_BNss: torch.Tensor, gamma: float = 2.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Focal and dice loss of each mask with each of the picture's, means over pixels: two of B x P x M x N.

    Focal loss: Lin et al. 2017 (https://arxiv.org/abs/1708.02002). Dice loss: Milletari et al. 2016
    (https://arxiv.org/abs/1606.04797), 0 to 1. A pixel on an edge is partly covered; its focal loss is the mean of
    that of a pixel on the mask and one off it, by how much of it is which. So both are products of matrices.

    Args:
        logits_BPMss: M masks for each of P prompts.
        masks_BNss: N masks of the picture, how much of each pixel they cover, 0 to 1.
        gamma: How much less well classified pixels count.
    """
    logits = logits_BPMss.flatten(3).flatten(1, 2)
    masks = masks_BNss.flatten(2).transpose(1, 2)
    probability = logits.sigmoid()
    on = (1 - probability) ** gamma * F.softplus(-logits)
    off = probability**gamma * F.softplus(logits)
    focal = (matmul_float32(on - off, masks) + off.sum(dim=2, keepdim=True)) / logits.shape[2]
    overlap = 2 * matmul_float32(probability, masks) + 1
    dice = 1 - overlap / (probability.sum(dim=2, keepdim=True) + masks.sum(dim=1, keepdim=True) + 1)
    shape = logits_BPMss.shape[1:3]
    return torch.unflatten(focal, 1, shape), torch.unflatten(dice, 1, shape)


def _mean_of_asked(values_BPN: torch.Tensor, asked_BPN: torch.Tensor) -> torch.Tensor:
    """Of each prompt the mean over the masks it asks for, and of these the mean."""
    return ((values_BPN * asked_BPN).sum(dim=2) / asked_BPN.sum(dim=2)).mean()


def _targets(batch: Batch) -> torch.Tensor:
    """B x P x N: the mask that each prompt was made for."""
    return F.one_hot(batch.targets_BP, batch.masks_BNss.shape[1]).bool()


def _under_click(batch: Batch) -> torch.Tensor:
    """B x P x N: the masks that each click lies on, at least the one it was made for."""
    side = batch.masks_BNss.shape[-1]
    cell_BP2 = (batch.points_BP2 / 4).long().clamp(0, side - 1)
    pictures = torch.arange(len(cell_BP2), device=cell_BP2.device)[:, None]
    covered_BPN = batch.masks_BNss[pictures, :, cell_BP2[..., 1], cell_BP2[..., 0]] > 127
    return covered_BPN | _targets(batch)


def _pairwise_iou(covered_BPMss: torch.Tensor, masks_BNss: torch.Tensor) -> torch.Tensor:
    """B x P x M x N, of bool."""
    mine, masks = covered_BPMss.flatten(3).flatten(1, 2).float(), masks_BNss.flatten(2).float()
    both = matmul_float32(mine, masks.transpose(1, 2))
    either = mine.sum(dim=2, keepdim=True) + masks.sum(dim=2)[:, None] - both
    return torch.unflatten(both / either.clamp(min=1), 1, covered_BPMss.shape[1:3])


def _best(logits_BPMss: torch.Tensor, target_BPss: torch.Tensor) -> torch.Tensor:
    """B x P x s x s: of each prompt's masks the one nearest to its target, which is bool."""
    pairs = logits_BPMss.flatten(0, 1)
    iou = _pairwise_iou(pairs[:, None] > 0, target_BPss.flatten(0, 1)[:, None])
    best = pairs[torch.arange(len(pairs), device=pairs.device), iou[:, 0, :, 0].argmax(dim=1)]
    return best.view_as(target_BPss)
