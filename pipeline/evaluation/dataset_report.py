"""The tables of `jobs.evaluate_masks`."""

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.against_truth import MOST, SIZES, Matching, PersonScores
from pipeline.evaluation.distributions import CONTAINED, DEEPEST, QUANTILES, Distributions
from pipeline.evaluation.report import Cell, Table

_TRUTH_NOTES: Final = (
    "AR: recall of segments by the masks of the best predicted IoU, without classes, mean over IoU "
    "0.50:0.05:0.95; segments of all images and people pooled, by COCO's areas: small up to 32 x 32 pixels, large "
    "from 96 x 96. Best IoU: mean over segments, with the mask most like each.",
    "Boundary recall: share of the segments' contours within 0.0075 of the diagonal of a mask's contour, mean "
    "over people and images.",
)
_NESTING_NOTES: Final = (
    f"Depth of a mask: how many larger masks of its image hold at least {CONTAINED:.0%} of its pixels.",
)


def truth_table(kind: str, scores: Sequence[Sequence[PersonScores]], matching: Matching) -> Table:
    """The table of `against_truth.measure`, a row a range of areas."""
    people = [person for image in scores for person in image]
    contours = np.array([person.boundary_recall for person in people])
    columns = ("segments' area", "segments", *(f"AR@{most}" for most in MOST), "best IoU", "boundary recall")
    rows = tuple((size, *_of_size(size, people), _mean(contours) if size == "all" else None) for size in SIZES)
    counts = (
        f"{matching.measured} images were measured. {matching.without_truth} are in the dataset only, "
        f"{matching.truth_only} in the truth only, or beyond the limit; {matching.other_size} have another size "
        "there than here, or none, and were left out."
    )
    return Table(f"Against the truth: {kind}", (counts, *_TRUTH_NOTES), columns, rows)


def _of_size(size: str, people: Sequence[PersonScores]) -> tuple[Cell, ...]:
    of_size = [person.by_size[size] for person in people]
    best_N = np.concatenate([np.zeros(0), *(scores.best_iou_N for scores in of_size)])
    recalled_M = sum((scores.recalled_M for scores in of_size), np.zeros(len(MOST)))
    recalls = recalled_M / len(best_N) if len(best_N) else np.full(len(MOST), math.nan)
    return len(best_N), *(_finite(recall) for recall in recalls.tolist()), _mean(best_N)


def distribution_tables(found: Distributions) -> list[Table]:
    """The tables of `distributions`: quantiles, and a row a depth."""
    quantities: dict[str, NDArray[Any]] = {
        "masks an image": found.masks_I,
        "predicted IoU": found.predicted_iou_N,
        "stability score": found.stability_N,
        "share of the image": found.share_N,
    }
    columns = ("", "number", "mean", *(f"{quantile:.0%}" for quantile in QUANTILES))
    depth_N = np.minimum(found.depth_N, DEEPEST)
    nesting = tuple(
        (f"{depth} or more" if depth == DEEPEST else str(depth), count, count / max(len(depth_N), 1))
        for depth, count in enumerate(np.bincount(depth_N, minlength=DEEPEST + 1).tolist())
    )
    return [
        Table("Masks", (), columns, tuple((name, *_quantiles(values)) for name, values in quantities.items())),
        Table("Nesting", _NESTING_NOTES, ("depth", "masks", "share"), nesting),
    ]


def _quantiles(values: NDArray[Any]) -> tuple[Cell, ...]:
    numbers = values[~np.isnan(values)]
    quantiles = np.quantile(numbers, QUANTILES).tolist() if len(numbers) else [None] * len(QUANTILES)
    return len(numbers), _mean(numbers), *quantiles


def _mean(values: NDArray[Any]) -> float | None:
    """Of those that are numbers; None where there is none."""
    numbers = values[~np.isnan(values)]
    return float(numbers.mean()) if len(numbers) else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
