"""How many masks each filter left of an image: what the report calls the funnel."""

from dataclasses import astuple, dataclass


@dataclass(frozen=True)
class Funnel:
    """Counts of masks, exact; `confident` = `unstable` + `cut` + `duplicates` + the masks that stay.

    Each mask that goes is counted once, by what dropped it. A mask that surely overlaps a better one that stays is
    dropped unmeasured (`pipeline.amg.selection`) and counted as a duplicate, though it may also be unstable. So
    `unstable` is what the threshold dropped of the measured, and no more than would fail it of all.
    """

    candidates: int = 0
    """Masks that the decoder predicted: three a prompt, of all crops."""
    confident: int = 0
    """Of these, with a predicted IoU above `pred_iou_thresh`."""
    unstable: int = 0
    """Measured, with a stability score below `stability_score_thresh`."""
    cut: int = 0
    """Stable, and cut by the edge of their crop inside the image."""
    duplicates: int = 0
    """Their box overlaps a better mask's: within a crop, across crops, or after small regions are removed."""

    def __add__(self, other: "Funnel") -> "Funnel":
        return Funnel(*(one + two for one, two in zip(astuple(self), astuple(other), strict=True)))
