"""Models against masks that people marked or that are exact: one click a segment, and all masks of a picture."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pipeline import rle
from pipeline.amg import MaskGenerator
from pipeline.config import AmgConfig
from pipeline.evaluation import felzenszwalb
from pipeline.evaluation.metrics import average_recall, boundary_iou, coverage, iou_matrix, mask_iou
from pipeline.evaluation.pictures import Picture
from pipeline.evaluation.prompting import Answers, answer, batches, farthest_from_border
from pipeline.model.sam import SamModel
from pipeline.rle import Rle

MOST_MASKS: Final = 1000
"""Masks of a picture that count for average recall."""
AS_MANY: Final = "Felzenszwalb, as many masks"
ALL: Final = "Felzenszwalb, all masks"


@dataclass(frozen=True)
class Segments:
    """The N segments of a picture that are asked for, of all people, and where each is clicked."""

    masks_NHW: NDArray[np.bool_]
    people_N: NDArray[np.int64]
    """Who marked each."""
    points_N2: NDArray[np.float64]
    """x, y of the pixel farthest from the segment's border."""
    rles: list[Rle]


@dataclass(frozen=True)
class ClickScores:
    """IoU of the answers to one click in each of N segments."""

    best_N: NDArray[np.float64]
    """Of the mask of the three that is most like the segment."""
    chosen_N: NDArray[np.float64]
    """Of the mask of the three that the method itself holds for the best."""
    boundary_N: NDArray[np.float64]
    """Boundary IoU of the mask most like the segment."""


@dataclass(frozen=True)
class ProposalScores:
    """All masks of a picture."""

    average_recall: float
    """AR@1000, averaged over people; NaN where nobody marked anything."""
    masks: int
    coverage: float
    """Share of the picture in at least one mask."""


@dataclass(frozen=True)
class PictureScores:
    """What a method did on one picture."""

    clicks: ClickScores
    proposals: ProposalScores


def segments_of(picture: Picture) -> Segments:
    """The segments that people marked in a picture, one after another."""
    masks_NHW = np.concatenate([*picture.people, np.zeros((0, *picture.rgb_HW3.shape[:2]), bool)])
    people_N = np.repeat(np.arange(len(picture.people)), [len(masks) for masks in picture.people])
    points = [farthest_from_border(mask) for mask in masks_NHW]
    encoded = [rle.encode(mask) for mask in masks_NHW]
    return Segments(masks_NHW, people_N, np.array(points, dtype=float).reshape(-1, 2), encoded)


def measure(
    models: Mapping[str, SamModel], pictures: Iterable[Picture], config: AmgConfig, *, with_felzenszwalb: bool
) -> dict[str, list[PictureScores]]:
    """Every method on every picture.

    Args:
        models: By the name of their row.
        pictures: With masks.
        config: How all masks of a picture are found, and how many prompts are answered at once.
        with_felzenszwalb: Add rows `AS_MANY`, with as many masks of a picture as the first model found, and
            `ALL`. They differ in the proposals only.
    """
    generators = {name: MaskGenerator(model, **dict(config)) for name, model in models.items()}
    scores: dict[str, list[PictureScores]] = {name: [] for name in models}
    if with_felzenszwalb:
        scores |= {AS_MANY: [], ALL: []}
    for picture in pictures:
        segments = segments_of(picture)
        for name, generator in generators.items():
            scores[name].append(of_model(generator, picture, segments))
        if with_felzenszwalb:
            divided = felzenszwalb.partitions(picture.rgb_HW3)
            clicks = click_scores(felzenszwalb.answer_clicks(divided, segments.points_N2), segments.masks_NHW)
            found = felzenszwalb.proposals(divided)
            as_many = found[: scores[next(iter(models))][-1].proposals.masks]
            scores[AS_MANY].append(PictureScores(clicks, proposal_scores(as_many, segments)))
            scores[ALL].append(PictureScores(clicks, proposal_scores(found, segments)))
    return scores


def of_model(generator: MaskGenerator, picture: Picture, segments: Segments) -> PictureScores:
    """A model on one picture, which it encodes once. Masks rank by predicted IoU."""
    model, config = generator.model, generator.config
    embedding = model.encode(picture.rgb_HW3)
    clicks = [
        click_scores(
            answer(model, embedding, segments.points_N2[batch][:, None], config), segments.masks_NHW[batch]
        )
        for batch in batches(len(segments.points_N2), embedding.original_size, config)
    ]
    found = generator.generate(picture.rgb_HW3, embedding)
    found.sort(key=lambda mask: -mask["predicted_iou"])
    return PictureScores(_joined(clicks), proposal_scores([mask["segmentation"] for mask in found], segments))


def click_scores(answers: Answers, masks_NHW: NDArray[np.bool_]) -> ClickScores:
    """The answers to one click in each of N segments."""
    iou_N3 = mask_iou(answers.masks_N3HW, masks_NHW[:, None])
    best_N = iou_N3.argmax(axis=1)
    prompts_N = np.arange(len(masks_NHW))
    boundary_N = [boundary_iou(answers.masks_N3HW[i, best_N[i]], masks_NHW[i]) for i in prompts_N]
    chosen_N = iou_N3[prompts_N, answers.predicted_iou_N3.argmax(axis=1)]
    return ClickScores(iou_N3[prompts_N, best_N], chosen_N, np.array(boundary_N))


def proposal_scores(found: Sequence[Rle], segments: Segments) -> ProposalScores:
    """All masks of a picture, the best first, against the segments of each person."""
    height, width = segments.masks_NHW.shape[1:]
    ious_DN = iou_matrix(found, segments.rles)
    recalls = [
        average_recall(ious_DN[:, segments.people_N == person], MOST_MASKS)
        for person in np.unique(segments.people_N)
    ]
    recall = float(np.mean(recalls)) if recalls else float("nan")
    return ProposalScores(recall, len(found), coverage(found, height, width))


def _joined(parts: Sequence[ClickScores]) -> ClickScores:
    return ClickScores(
        *(
            np.concatenate([np.zeros(0), *(getattr(part, name) for part in parts)])
            for name in ("best_N", "chosen_N", "boundary_N")
        )
    )
