"""Thresholds for a model's masks, chosen so that what is kept is right and what is there is found."""

from collections.abc import Iterable
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
_STABILITIES: Final = np.linspace(0.5, 0.98, 25)
_QUANTILES: Final = np.linspace(0, 0.99, 50)


def choose_thresholds(
    model: SamModel, pictures: Iterable[Picture], config: AmgConfig
) -> tuple[dict[str, float], float]:
    """The pair of thresholds with the highest mean F1 over pictures.

    Precision is the share of a picture's masks that match a segment of anybody with an IoU of 0.5, recall the
    share of all people's segments that are matched by a mask.

    Args:
        model: Whose masks are to be kept or dropped.
        pictures: With masks.
        config: How masks are found; its thresholds are not used.

    Returns:
        `pred_iou_thresh` and `stability_score_thresh`, and the F1 that they reach, 0 to 1.
    """
    loose = config.model_copy(update={"pred_iou_thresh": -10.0, "stability_score_thresh": 0.0})
    generator = MaskGenerator(model, **dict(loose))
    found = [_scored(generator, picture) for picture in pictures]
    predicted = np.quantile(np.concatenate([scores for _, scores, _ in found]), _QUANTILES)
    best = max(
        (float(np.mean([_f1(*one, iou, stability) for one in found])), float(iou), float(stability))
        for iou in predicted
        for stability in _STABILITIES
    )
    thresholds = {"pred_iou_thresh": round(best[1], 3), "stability_score_thresh": round(best[2], 3)}
    return thresholds, best[0]


_Scored = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]


def _scored(generator: MaskGenerator, picture: Picture) -> _Scored:
    """IoU of each mask with each segment, and the masks' predicted IoUs and stability scores."""
    masks = generator.generate(picture.rgb_HW3)
    ious = iou_matrix([mask["segmentation"] for mask in masks], segments_of(picture).rles)
    predicted, stability = (
        np.array([mask[key] for mask in masks]) for key in ("predicted_iou", "stability_score")
    )
    return ious, predicted, np.nan_to_num(stability)


def _f1(
    ious_DN: NDArray[np.float64],
    predicted_D: NDArray[np.float64],
    stability_D: NDArray[np.float64],
    iou_thresh: float,
    stability_thresh: float,
) -> float:
    right_DN = ious_DN[(predicted_D > iou_thresh) & (stability_D >= stability_thresh)] >= _RIGHT
    if not right_DN.size:
        return 0.0
    precision, recall = right_DN.any(axis=1).mean(), right_DN.any(axis=0).mean()
    return float(2 * precision * recall / max(precision + recall, 1e-9))
