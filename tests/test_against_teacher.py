"""Students against their teacher: masks for the same prompts, and embeddings."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from seeded import PHOTOGRAPHS, lively_state_dict, model_with

from pipeline.config import AmgConfig
from pipeline.evaluation import against_teacher
from pipeline.evaluation.against_teacher import EmbeddingScores
from pipeline.evaluation.pictures import Picture
from pipeline.model.sam import Embedding
from pipeline.model.weights import seeded_model


def test_a_model_agrees_with_itself() -> None:
    model = model_with(lively_state_dict(), 128)
    [scores] = against_teacher.measure(
        {"itself": model}, model, [Picture("a", PHOTOGRAPHS["portrait"]())], 4, AmgConfig(points_per_batch=5)
    )["itself"]
    agreement = scores.agreement
    assert sorted(agreement.points_N.tolist()) == [1] * 16 + [2] * 16
    for column in (agreement.chosen_N, agreement.best_N, agreement.boundary_N):
        assert column.tolist() == [1] * 32
    assert len(set(agreement.share_N.tolist())) > 8
    assert scores.embedding is not None
    assert scores.embedding.mse == 0
    assert scores.embedding.cosine == pytest.approx(1, abs=1e-6)


def test_another_model_does_not() -> None:
    teacher, picture = model_with(lively_state_dict(), 128), Picture("a", PHOTOGRAPHS["portrait"]())
    students = {"other": model_with(lively_state_dict(1), 128), "smaller": model_with(lively_state_dict(), 64)}
    scores = against_teacher.compare(students, teacher, picture, 3, AmgConfig())
    assert scores["other"].agreement.chosen_N.mean() < 0.9
    assert scores["other"].agreement.boundary_N.mean() < 0.9
    assert (scores["other"].agreement.best_N >= scores["other"].agreement.chosen_N).all()
    assert scores["other"].embedding is not None
    assert scores["other"].embedding.mse > 0.01
    assert scores["other"].embedding.cosine < 0.9
    assert scores["smaller"].embedding is None
    assert 0 < scores["smaller"].agreement.chosen_N.mean() < 1


def test_the_second_points_depend_on_the_pictures_name_alone() -> None:
    teacher, student = model_with(lively_state_dict(), 64), model_with(lively_state_dict(1), 64)
    a, b = (Picture(name, PHOTOGRAPHS["small"]()) for name in "ab")
    first, alone, other = (
        against_teacher.measure({"": student}, teacher, pictures, 3, AmgConfig())[""][-1].agreement
        for pictures in ([b, a], [a], [b])
    )
    two = first.points_N == 2
    np.testing.assert_array_equal(first.chosen_N, alone.chosen_N)
    assert (first.share_N[two] != other.share_N[two]).any()
    np.testing.assert_array_equal(first.share_N[~two], other.share_N[~two])


def test_embeddings_are_compared_without_padding() -> None:
    features = torch.randn(1, 256, 4, 4, generator=torch.Generator().manual_seed(0))
    a = Embedding(features, (40, 80), (33, 64))  # three of four rows of positions see the picture
    padding, seen = features.clone(), features.clone()
    padding[:, :, 3] += 100
    seen[:, :, 2] += 2
    same = against_teacher.embedding_scores(a, replace(a, features_1CHW=padding))
    assert same == EmbeddingScores(0.0, pytest.approx(1.0))
    differing = against_teacher.embedding_scores(a, replace(a, features_1CHW=seen))
    assert differing.mse == pytest.approx(4 / 3, rel=1e-5)
    assert differing.cosine < 0.9
    opposite = against_teacher.embedding_scores(a, replace(a, features_1CHW=-features))
    assert opposite.cosine == pytest.approx(-1)


def test_large_pictures_are_compared_at_1024() -> None:
    small, large = PHOTOGRAPHS["small"](), PHOTOGRAPHS["large"]()
    assert against_teacher.compared_size(Picture("", small)) == small.shape[:2]
    assert against_teacher.compared_size(Picture("", large)) == (192, 1024)
    model = seeded_model(0, 64)
    scores = against_teacher.compare({"itself": model}, model, Picture("", large), 2, AmgConfig())["itself"]
    assert scores.agreement.chosen_N.tolist() == [1] * 8
