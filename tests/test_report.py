"""The report: which prompts a row counts, and its Markdown."""

from dataclasses import replace

import numpy as np
import pytest

from pipeline.evaluation.against_teacher import Agreement, EmbeddingScores, StudentScores
from pipeline.evaluation.report import as_markdown, teacher_tables


def test_prompts_are_told_apart_by_size_and_points() -> None:
    shares = np.array([0, 0.005, 0.01, 0.1, 0.3, 1.0, 0.3])
    points = np.array([1, 1, 1, 1, 1, 1, 2])
    values = np.array([0.0, 1.0, 0.3, 0.4, 0.5, 0.7, 0.9])
    scores = StudentScores(Agreement(points, shares, values, values, values), EmbeddingScores(2.0, 0.5))
    masks, embeddings = teacher_tables("photographs", {"s": [scores, replace(scores, embedding=None)]})
    found = {row[1:3]: row[3:5] for row in masks.rows}
    assert found[1, "0% to 1%"] == (4, 0.5)
    assert found[1, "1% to 5%"] == (2, 0.3)
    assert found[1, "5% to 20%"] == (2, 0.4)
    assert found[1, "20% to 100%"] == (4, pytest.approx(0.6))
    assert found[2, "all"] == (2, 0.9)
    assert found[2, "0% to 1%"] == (0, None)
    assert embeddings.rows == (("s", 2, 2.0, 0.5),)
    text = as_markdown({"device": "cpu"}, [masks, embeddings])
    assert "| s | 1 | 0% to 1% | 4 | 0.5000 | 0.5000 | 0.5000 |" in text
    assert "| s | 2 | 0% to 1% | 0 | - | - | - |" in text
