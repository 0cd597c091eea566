"""Masks on their way through the filters."""

from dataclasses import dataclass, fields

import torch

from pipeline.amg.bounds import Bounds


@dataclass(frozen=True)
class Found:
    """Confident masks of some prompts of one crop, as low-resolution logits, not yet measured."""

    logits_NSS: torch.Tensor
    """float32, a quarter of the model's image size on a side."""
    predicted_iou_N: torch.Tensor
    prompts_N: torch.Tensor
    """int64, which of the crop's prompts each comes from."""
    bounds: Bounds
    """Of their boxes."""


@dataclass(frozen=True)
class Candidates:
    """N masks of one crop, measured, still as low-resolution logits. All tensors are on one device."""

    logits_NSS: torch.Tensor
    predicted_iou_N: torch.Tensor
    prompts_N: torch.Tensor
    stability_score_N: torch.Tensor
    boxes_N4_xyxy: torch.Tensor
    """int64, in the crop's pixels; the right and lower edges are the last pixel's own."""

    def select(self, keep: torch.Tensor) -> "Candidates":
        """Those candidates that a bool mask or an index tensor names, in that order."""
        return Candidates(*(getattr(self, field.name)[keep] for field in fields(self)))

    def __len__(self) -> int:
        return len(self.boxes_N4_xyxy)


def concatenate(parts: list[Candidates]) -> Candidates:
    """One `Candidates` of at least one."""
    return Candidates(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Candidates)))
