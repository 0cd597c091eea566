"""Thresholds for a model's masks, chosen so that what is kept is right and what is there is found."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pipeline.amg import MaskGenerator
from pipeline.config import AmgConfig
from pipeline.evaluation.against_masks import segments_of
from pipeline.evaluation.metrics import iou_matrix
from pipeline.evaluation.pictures import Picture
from pipeline.model.sam import SamModel

_RIGHT: Final = 0.5  # IoU from which a mask and a segment are the same
_KEPT_RECALL: Final = 0.8  # of what the loosest thresholds reach
_STABILITIES: Final = np.linspace(0.5, 0.98, 25)
_QUANTILES: Final = np.linspace(0, 0.99, 50)


@dataclass(frozen=True)
class Choice:
    """Thresholds, and what they do on the pictures they were chosen on."""

    thresholds: dict[str, float]
    """`pred_iou_thresh` and `stability_score_thresh`."""
    precision: float
    """Share of the kept masks that match a segment of anybody, with an IoU of 0.5 or more."""
    recall: float
    """Share of all people's segments that a kept mask matches."""


def choose_thresholds(model: SamModel, pictures: Iterable[Picture], config: AmgConfig) -> Choice:
    """The pair of thresholds of the highest precision that loses no more than a fifth of the recall.

    Generating all masks of a picture is about recall. So thresholds take away what is wrong as long as what is
    right stays.

    An approximation: masks are generated once, without thresholds, and dropped afterwards. Generation drops before
    it looks for duplicates, so there a mask may stay whose better-scored duplicate is not stable enough, and the
    precision and recall of a run with these thresholds are a little different.

    Args:
        model: Whose masks are to be kept or dropped.
        pictures: With masks.
        config: How masks are found; its thresholds are not used.
    """
    loose = config.model_copy(update={"pred_iou_thresh": -10.0, "stability_score_thresh": 0.0})
    generator = MaskGenerator(model, **dict(loose))
    found = [_scored(generator, picture) for picture in pictures]
    predicted = np.quantile(np.concatenate([scores for _, scores, _ in found]), _QUANTILES)
    choices = [
        _choice(found, round(float(iou), 3), round(float(stability), 3))
        for iou in (predicted[0] - 1e-3, *predicted)
        for stability in (0.0, *_STABILITIES)
    ]
    least = _KEPT_RECALL * max(choice.recall for choice in choices)
    return max(
        (choice for choice in choices if choice.recall >= least),
        key=lambda choice: (choice.precision, choice.recall),
    )


_Scored = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]


def _scored(generator: MaskGenerator, picture: Picture) -> _Scored:
    """IoU of each mask with each segment, and the masks' predicted IoUs and stability scores."""
    masks = generator.generate(picture.rgb_HW3)
    ious = iou_matrix([mask["segmentation"] for mask in masks], segments_of(picture).rles)
    predicted, stability = (
        np.array([mask[key] for mask in masks]) for key in ("predicted_iou", "stability_score")
    )
    return ious, predicted, np.nan_to_num(stability)


def _choice(found: list[_Scored], iou_thresh: float, stability_thresh: float) -> Choice:
    masks = right = segments = matched = 0
    for ious_DN, predicted_D, stability_D in found:
        kept = (predicted_D > iou_thresh) & (stability_D >= stability_thresh)
        right_DN = ious_DN[kept] >= _RIGHT
        masks += len(right_DN)
        right += int(right_DN.any(axis=1).sum())
        segments += right_DN.shape[1]
        matched += int(right_DN.any(axis=0).sum())
    thresholds = {"pred_iou_thresh": iou_thresh, "stability_score_thresh": stability_thresh}
    return Choice(thresholds, right / max(masks, 1), matched / max(segments, 1))
