"""Measurements as tables: Markdown to read, JSON to compute with."""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.against_masks import MOST_MASKS, PictureScores
from pipeline.evaluation.against_teacher import BINS, Agreement, StudentScores, joined

Cell = str | int | float | None

_MASKS_NOTES: Final = (
    "One click a segment, where it is farthest from its border; segments of at least 1 % of the picture; means "
    "over all segments of all people. Best of 3: of a prompt's three masks the one most like the segment. Own "
    "choice: the one that the method itself rates highest. Boundary IoU is that of the best of 3.",
    f"AR@{MOST_MASKS}: recall of the same segments by all masks of the picture, mean over IoU 0.50:0.05:0.95, "
    "then over people, then over pictures. Coverage: share of the picture in any mask.",
)
_TEACHER_NOTES: Final = (
    "The same prompts for both; the teacher's mask is the one that it rates highest. mIoU: with the mask that the "
    "model rates highest. Best of 3: with the most alike of the model's three. Boundary IoU: as mIoU. Means over "
    "prompts, told apart by the share of the picture in the teacher's mask. The second point is drawn from the "
    "teacher's mask for the first. Pictures of more than 1024 pixels on a side are compared at 1024.",
)
_EMBEDDINGS_NOTES: Final = (
    "Means over pictures; without positions that are padding only. No number: image sizes differ, so that "
    "positions do not correspond.",
)


@dataclass(frozen=True)
class Table:
    """One table of numbers."""

    title: str
    notes: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    """None where there is no number."""


def masks_table(pictures: str, scores: Mapping[str, Sequence[PictureScores]]) -> Table:
    """The table of `against_masks.measure`, a row a method.

    Args:
        pictures: Their name, for the title.
        scores: By method, of the pictures in order.
    """
    columns = (
        *("method", "pictures", "segments", "mIoU, best of 3", "mIoU, own choice", "boundary IoU"),
        *(f"AR@{MOST_MASKS}", "masks a picture", "coverage"),
    )
    rows = tuple((name, *_masks_row(of_method)) for name, of_method in scores.items())
    return Table(f"Against masks: {pictures}", _MASKS_NOTES, columns, rows)


def _masks_row(scores: Sequence[PictureScores]) -> tuple[Cell, ...]:
    best_N = np.concatenate([picture.clicks.best_N for picture in scores])
    chosen_N = np.concatenate([picture.clicks.chosen_N for picture in scores])
    boundary_N = np.concatenate([picture.clicks.boundary_N for picture in scores])
    recalls = np.array([picture.proposals.average_recall for picture in scores])
    return (
        *(len(scores), len(best_N), _mean(best_N), _mean(chosen_N), _mean(boundary_N)),
        _mean(recalls[~np.isnan(recalls)]),
        _mean(np.array([picture.proposals.masks for picture in scores])),
        _mean(np.array([picture.proposals.coverage for picture in scores])),
    )


def teacher_tables(pictures: str, scores: Mapping[str, Sequence[StudentScores]]) -> list[Table]:
    """The tables of `against_teacher.measure`: masks by points and size, and embeddings.

    Args:
        pictures: Their name, for the title.
        scores: By student, of the pictures in order.
    """
    return [
        Table(
            f"Masks against the teacher's: {pictures}",
            _TEACHER_NOTES,
            ("model", "points", "teacher's mask", "prompts", "mIoU", "mIoU, best of 3", "boundary IoU"),
            tuple(
                (name, *row)
                for name, of_student in scores.items()
                for row in _teacher_rows(joined(picture.agreement for picture in of_student))
            ),
        ),
        Table(
            f"Embeddings against the teacher's: {pictures}",
            _EMBEDDINGS_NOTES,
            ("model", "pictures", "mean squared error", "cosine"),
            tuple((name, *_embeddings_row(of_student)) for name, of_student in scores.items()),
        ),
    ]


def _teacher_rows(agreement: Agreement) -> list[tuple[Cell, ...]]:
    rows: list[tuple[Cell, ...]] = []
    bin_N = np.digitize(agreement.share_N, BINS[1:-1])
    for points in np.unique(agreement.points_N).tolist():
        of_points = agreement.points_N == points
        names = [f"{low:.0%} to {high:.0%}" for low, high in itertools.pairwise(BINS)]
        selections = {"all": of_points} | {name: of_points & (bin_N == i) for i, name in enumerate(names)}
        for name, selected in selections.items():
            columns = (agreement.chosen_N, agreement.best_N, agreement.boundary_N)
            rows.append((points, name, int(selected.sum()), *(_mean(column[selected]) for column in columns)))
    return rows


def _embeddings_row(scores: Sequence[StudentScores]) -> tuple[Cell, ...]:
    compared = [picture.embedding for picture in scores if picture.embedding is not None]
    return (
        len(scores),
        _mean(np.array([embedding.mse for embedding in compared])),
        _mean(np.array([embedding.cosine for embedding in compared])),
    )


def _mean(values: NDArray[Any]) -> float | None:
    """None where there is no number."""
    mean = float(values.mean()) if len(values) else math.nan
    return mean if math.isfinite(mean) else None


def as_markdown(header: Mapping[str, str], tables: Sequence[Table]) -> str:
    """A document to read: what was measured, and each table under its title."""
    lines = ["# Evaluation", "", *(f"* {name}: {value}" for name, value in header.items())]
    for table in tables:
        lines += ["", f"## {table.title}", ""]
        for note in table.notes:
            lines += [note, ""]
        lines += [_line(table.columns), _line(["---"] * len(table.columns))]
        lines += [_line([_text(cell) for cell in row]) for row in table.rows]
    return "\n".join(lines) + "\n"


def as_json(header: Mapping[str, str], tables: Sequence[Table]) -> str:
    """The same with all digits: `{"header": ..., "tables": [{"title", "notes", "columns", "rows"}]}`."""
    document = {"header": dict(header), "tables": [asdict(table) for table in tables]}
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _text(cell: Cell) -> str:
    if cell is None:
        return "-"
    return f"{cell:.4f}" if isinstance(cell, float) else str(cell)
