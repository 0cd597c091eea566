"""The metrics on masks whose values are known."""

from typing import Any

import numpy as np
import pytest
import scipy.ndimage
from known_masks import Mask, blobs, box
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pipeline import rle
from pipeline.evaluation import metrics


def test_iou_counts_pixels() -> None:
    a, b = box((4, 5), 0, 0, 2, 2), box((4, 5), 0, 1, 2, 3)
    assert metrics.mask_iou(a, b) == pytest.approx(2 / 6)
    assert metrics.mask_iou(a, a) == 1
    assert metrics.mask_iou(a, ~a) == 0


def test_two_empty_masks_are_the_same() -> None:
    empty, full = np.zeros((2, 3), bool), np.ones((2, 3), bool)
    assert metrics.mask_iou(empty, empty) == 1
    assert metrics.mask_iou(empty, full) == 0
    assert metrics.boundary_iou(empty, empty) == 1


def test_iou_of_many_is_that_of_each() -> None:
    a, b = blobs(6, 20, 30).reshape(2, 3, 20, 30), blobs(2, 20, 30, seed=1)
    ious = metrics.mask_iou(a, b[:, None])
    assert ious.shape == (2, 3)
    assert ious[1, 2] == metrics.mask_iou(a[1, 2], b[1])


def test_the_boundary_is_a_ring_as_wide_as_the_diagonal_says() -> None:
    small = metrics.boundary(box((30, 40), 5, 5, 15, 15))  # diagonal 50: one pixel
    assert small.sum() == 100 - 8 * 8
    large = metrics.boundary(box((300, 400), 100, 100, 200, 200))  # diagonal 500: ten pixels
    assert large.sum() == 100 * 100 - 80 * 80


def test_the_pictures_edge_bounds_a_mask() -> None:
    assert metrics.boundary(np.ones((30, 40), bool)).sum() == 30 * 40 - 28 * 38


def test_boundary_iou_of_a_shifted_square() -> None:
    # Rings of 36 pixels each, which share 9 pixels of the upper and 9 of the lower side.
    a, b = box((20, 20), 5, 5, 15, 15), box((20, 20), 5, 6, 15, 16)
    assert metrics.boundary_iou(a, b) == pytest.approx(18 / 54)
    assert metrics.mask_iou(a, b) == pytest.approx(90 / 110)


@pytest.mark.parametrize(
    ("height", "width", "ratio"), [(20, 31, 0.02), (70, 90, 0.02), (64, 48, 0.1), (301, 180, 0.02)]
)
def test_boundary_iou_by_chessboard_distance(height: int, width: int, ratio: float) -> None:
    def near_contour(mask: Mask) -> Mask:
        distance = scipy.ndimage.distance_transform_cdt(np.pad(mask, 1), "chessboard")[1:-1, 1:-1]
        near: Mask = mask & (distance <= max(1, round(ratio * (height**2 + width**2) ** 0.5)))
        return near

    for a, b in zip(blobs(5, height, width), blobs(5, height, width, seed=1), strict=True):
        rings = near_contour(a), near_contour(b)
        expected = (rings[0] & rings[1]).sum() / (rings[0] | rings[1]).sum()
        assert metrics.boundary_iou(a, b, ratio) == pytest.approx(expected)


def test_average_recall_by_hand() -> None:
    ious = np.array([[0.62, 0.0], [0.0, 0.97]])  # found at 3 and at 10 of 10 thresholds
    assert metrics.average_recall(ious, 1000) == pytest.approx(13 / 20)
    assert metrics.average_recall(ious, 1) == pytest.approx(3 / 20)


def test_a_mask_finds_one_segment_and_a_segment_is_found_once() -> None:
    assert metrics.average_recall(np.array([[0.99], [0.98]]), 1000) == 1
    assert metrics.average_recall(np.array([[0.98, 0.99]]), 1000) == 0.5
    # The better mask takes the segment that it overlaps most, and the next the rest.
    assert metrics.average_recall(np.array([[0.98, 0.99], [0.98, 0.98]]), 1000) == 1
    assert metrics.average_recall(np.array([[0.99, 0.98], [0.98, 0.0]]), 1000) == 0.5


def test_recall_without_masks_or_segments() -> None:
    assert metrics.average_recall(np.zeros((0, 3)), 1000) == 0
    assert np.isnan(metrics.average_recall(np.zeros((3, 0)), 1000))


@pytest.mark.parametrize("most", [1, 5, 1000])
def test_average_recall_is_cocos(most: int) -> None:
    rng = np.random.default_rng(0)
    wanted = blobs(8, 40, 50)
    found = np.concatenate([wanted, wanted, wanted]) ^ (rng.random((24, 40, 50)) < rng.uniform(0, 0.4, (24, 1, 1)))
    scores = rng.permutation(24) / 24
    order = np.argsort(-scores)
    ious = metrics.iou_matrix([rle.encode(found[i]) for i in order], [rle.encode(mask) for mask in wanted])
    ours = metrics.average_recall(ious, most)
    assert 0 < ours < 1
    assert ours == pytest.approx(cocos_average_recall(wanted, found, scores, most))


def cocos_average_recall(wanted: Mask, found: Mask, scores: NDArray[np.float64], most: int) -> float:
    def annotation(number: int, mask: Mask) -> dict[str, Any]:
        encoded = rle.encode(mask)
        area = rle.area(encoded)
        return {"id": number, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": area, "segmentation": encoded}

    truth = COCO()
    truth.dataset = {
        "images": [{"id": 1, "height": wanted.shape[1], "width": wanted.shape[2]}],
        "categories": [{"id": 1}],
        "annotations": [annotation(i + 1, mask) for i, mask in enumerate(wanted)],
        "info": {},
    }
    truth.createIndex()
    results = [annotation(i + 1, mask) | {"score": scores[i]} for i, mask in enumerate(found)]
    evaluation = COCOeval(truth, truth.loadRes(results), "segm")
    evaluation.params.useCats = 0
    evaluation.params.maxDets = [most]
    evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
    evaluation.evaluate()
    evaluation.accumulate()
    return float(evaluation.eval["recall"].mean())


def test_iou_matrix_is_the_iou_of_each_pair() -> None:
    found, wanted = blobs(3, 20, 30), blobs(2, 20, 30, seed=1)
    matrix = metrics.iou_matrix([rle.encode(mask) for mask in found], [rle.encode(mask) for mask in wanted])
    np.testing.assert_allclose(matrix, metrics.mask_iou(found[:, None], wanted[None]))
    assert metrics.iou_matrix([], [rle.encode(wanted[0])]).shape == (0, 1)


def test_coverage_counts_a_pixel_once() -> None:
    masks = [rle.encode(box((10, 10), 0, 0, 5, 10)), rle.encode(box((10, 10), 0, 0, 10, 5))]
    assert metrics.coverage(masks, 10, 10) == 0.75
    assert metrics.coverage([], 10, 10) == 0
