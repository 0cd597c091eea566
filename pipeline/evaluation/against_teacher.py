"""Students against their teacher: how alike the masks of the same prompts and the embeddings are.

After section 4 of the MobileSAM paper, https://arxiv.org/abs/2306.14289, which takes the original SAM's masks
for the truth and reports the mean IoU of the student's. Here the prompts are a grid of points, and the results
are broken down by how much of the picture the teacher's mask takes.
"""

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from segment_anything.utils.amg import build_point_grid
from torch.nn import functional as F

from pipeline.config import AmgConfig
from pipeline.evaluation.metrics import boundary_iou, mask_iou
from pipeline.evaluation.pictures import Picture
from pipeline.evaluation.prompting import Answers, answer, batches, second_points
from pipeline.images import input_size_of
from pipeline.model.sam import PUBLISHED_IMAGE_SIZE, Embedding, SamModel
from pipeline.model.tinyvit import STRIDE

BINS: Final = (0.0, 0.01, 0.05, 0.2, 1.0)
"""Edges of the shares of a picture by which prompts are told apart; the first bin includes empty masks."""


class EmbeddingScores(NamedTuple):
    """How alike two embeddings of a picture are."""

    mse: float
    """Mean squared difference of all values; 0 for the same."""
    cosine: float
    """Mean over positions of the cosine between the 256 channels, -1 to 1."""


@dataclass(frozen=True)
class Agreement:
    """A student's masks beside its teacher's, for N prompts of as many points.

    The teacher's mask of a prompt is the one that it predicts the best IoU for.
    """

    points_N: NDArray[np.int64]
    """Points of the prompt, 1 or 2."""
    share_N: NDArray[np.float64]
    """Of the picture, in the teacher's mask."""
    chosen_N: NDArray[np.float64]
    """IoU of the teacher's mask and the one that the student predicts the best IoU for."""
    best_N: NDArray[np.float64]
    """IoU of the teacher's mask and that of the student's three which is most like it."""
    boundary_N: NDArray[np.float64]
    """Boundary IoU of the teacher's mask and the one that the student predicts the best IoU for."""


@dataclass(frozen=True)
class StudentScores:
    """A student on one picture."""

    agreement: Agreement
    embedding: EmbeddingScores | None
    """None where image sizes differ, so that positions do not correspond."""


def measure(
    students: Mapping[str, SamModel],
    teacher: SamModel,
    pictures: Iterable[Picture],
    prompts_per_side: int,
    config: AmgConfig,
) -> dict[str, list[StudentScores]]:
    """Every student on every picture.

    Prompts are a grid of `prompts_per_side` x `prompts_per_side` points, and the same points with a second one,
    drawn from the teacher's mask for the first. The draw depends on the picture's name only.

    Args:
        students: By the name of their row.
        teacher: Whose masks are taken for the truth.
        pictures: Their masks, if there are any, are not looked at.
        prompts_per_side: Prompts along a side of the grid.
        config: How many prompts are answered at once.
    """
    scores: dict[str, list[StudentScores]] = {name: [] for name in students}
    for picture in pictures:
        for name, of_picture in compare(students, teacher, picture, prompts_per_side, config).items():
            scores[name].append(of_picture)
    return scores


def compare(
    students: Mapping[str, SamModel],
    teacher: SamModel,
    picture: Picture,
    prompts_per_side: int,
    config: AmgConfig,
) -> dict[str, StudentScores]:
    """Every student on one picture, which each model encodes once.

    Masks are compared at the picture's size, or where that is more than 1024 pixels on the longer side at 1024.
    """
    height, width = size = compared_size(picture)
    truth = replace(teacher.encode(picture.rgb_HW3), original_size=size)
    embeddings = {
        name: replace(student.encode(picture.rgb_HW3), original_size=size) for name, student in students.items()
    }
    agreements: dict[str, list[Agreement]] = {name: [] for name in students}
    grid_N2 = build_point_grid(prompts_per_side) * [width, height]
    rng = np.random.default_rng(zlib.crc32(picture.name.encode(errors="replace")))
    for batch in batches(len(grid_N2), size, config):
        points_N12 = grid_N2[batch][:, None]
        one = answer(teacher, truth, points_N12, config).chosen_NHW
        second_N2 = second_points(one, grid_N2[batch], rng)
        points_N22 = np.concatenate([points_N12, second_N2[:, None]], axis=1)
        two = answer(teacher, truth, points_N22, config).chosen_NHW
        for name, student in students.items():
            for points_NP2, masks_NHW in ((points_N12, one), (points_N22, two)):
                answers = answer(student, embeddings[name], points_NP2, config)
                agreements[name].append(agreement(answers, masks_NHW, points_NP2.shape[1]))
    return {
        name: StudentScores(joined(agreements[name]), _embedding_scores(student, teacher, embeddings[name], truth))
        for name, student in students.items()
    }


def compared_size(picture: Picture) -> tuple[int, int]:
    """Height and width at which masks of the picture are compared."""
    height, width = picture.rgb_HW3.shape[:2]
    if max(height, width) <= PUBLISHED_IMAGE_SIZE:
        return height, width
    return input_size_of((height, width), PUBLISHED_IMAGE_SIZE)


def agreement(answers: Answers, teacher_NHW: NDArray[np.bool_], points: int) -> Agreement:
    """A student's answers beside its teacher's masks, for N prompts of `points` points."""
    chosen_NHW = answers.chosen_NHW
    boundary_N = [boundary_iou(a, b) for a, b in zip(chosen_NHW, teacher_NHW, strict=True)]
    return Agreement(
        np.full(len(teacher_NHW), points),
        teacher_NHW.mean(axis=(1, 2)),
        mask_iou(chosen_NHW, teacher_NHW),
        mask_iou(answers.masks_N3HW, teacher_NHW[:, None]).max(axis=1),
        np.array(boundary_N),
    )


def joined(parts: Iterable[Agreement]) -> Agreement:
    """Several agreements, at least one, as one."""
    columns = zip(*(vars(part).values() for part in parts), strict=True)
    return Agreement(*(np.concatenate(column) for column in columns))


def embedding_scores(a: Embedding, b: Embedding) -> EmbeddingScores:
    """Compare two embeddings of one picture at one image size, leaving out positions that are padding only."""
    height, width = a.input_size
    inside = (..., slice(-(-height // STRIDE)), slice(-(-width // STRIDE)))
    features_a, features_b = (embedding.features_1CHW[inside].cpu().double() for embedding in (a, b))
    mse = F.mse_loss(features_a, features_b)
    return EmbeddingScores(mse.item(), F.cosine_similarity(features_a, features_b, dim=1).mean().item())


def _embedding_scores(
    student: SamModel, teacher: SamModel, embedding: Embedding, truth: Embedding
) -> EmbeddingScores | None:
    return embedding_scores(embedding, truth) if student.image_size == teacher.image_size else None
