"""What stays of a crop's masks, with as few measured as may be."""

from typing import Any

import numpy as np
import pytest
import torch
from drawn_masks import IMAGE_SIZE, MASK_SIZE, draw
from segment_anything.utils.transforms import ResizeLongestSide
from test_resize import SIZES

from pipeline.amg import filters, selection
from pipeline.amg.bounds import Bounds, bounds, surely_overlap
from pipeline.amg.candidates import Candidates, Found
from pipeline.amg.measure import Measured, measure
from pipeline.amg.resize import full_size_masks
from pipeline.amg.selection import Crop, select
from pipeline.config import AmgConfig
from pipeline.model.sam import Embedding


def embedding_of(size: tuple[int, int], image_size: int) -> Embedding:
    height, width = (max(1, side) for side in ResizeLongestSide.get_preprocess_shape(*size, image_size))
    return Embedding(torch.empty(1), size, (height, width))


def found_in(embedding: Embedding, points_N2: Any) -> list[Found]:
    """Drawn masks, of four prompts in each part."""
    parts = []
    for start in range(0, len(points_N2), 4):
        logits, iou = draw((0, 0), points_N2[start : start + 4])
        logits_NSS = logits.flatten(0, 1)
        prompts_N = start + torch.arange(len(logits_NSS)) // 3
        parts.append(Found(logits_NSS, iou.flatten(), prompts_N, bounds(logits_NSS, embedding, IMAGE_SIZE)))
    return parts


def plainly(found: list[Found], crop: Crop, config: AmgConfig) -> Candidates:
    """All measured, filtered, and suppressed at once."""
    logits_NSS = torch.cat([part.logits_NSS for part in found])
    measured = measure(logits_NSS, crop.embedding, IMAGE_SIZE, config.stability_score_offset)
    candidates = Candidates(
        logits_NSS,
        torch.cat([part.predicted_iou_N for part in found]),
        torch.cat([part.prompts_N for part in found]),
        *measured,
    )
    candidates = filters.stable(candidates, config.stability_score_thresh or 0)
    candidates = filters.whole(candidates, crop.box_xyxy, crop.of_image)
    return candidates.select(
        filters.nms(candidates.boxes_N4_xyxy, candidates.predicted_iou_N, config.box_nms_thresh)
    )


@pytest.mark.parametrize("box_nms_thresh", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("stability_score_thresh", [0.0, 0.9])
@pytest.mark.parametrize(
    ("size", "of_image"),
    [((200, 256), (200, 256)), ((200, 256), (300, 400)), ((900, 61), (900, 61)), ((37, 1000), (37, 1000))],
    ids=str,
)
def test_what_stays_is_what_plain_suppression_leaves(
    size: tuple[int, int], of_image: tuple[int, int], stability_score_thresh: float, box_nms_thresh: float
) -> None:
    embedding = embedding_of(size, IMAGE_SIZE)
    height, width = embedding.input_size
    points_N2 = np.random.default_rng(7).random((100, 2)) * [width, height]
    config = AmgConfig(stability_score_thresh=stability_score_thresh, box_nms_thresh=box_nms_thresh)
    crop = Crop(embedding, [0, 0, size[1], size[0]], of_image)
    found = found_in(embedding, points_N2)
    expected, got = plainly(found, crop, config), select(found, crop, IMAGE_SIZE, config).candidates
    assert 0 < len(expected) <= 300
    assert torch.equal(got.prompts_N, expected.prompts_N)
    assert torch.equal(got.logits_NSS, expected.logits_NSS)
    assert torch.equal(got.predicted_iou_N, expected.predicted_iou_N)
    assert torch.equal(got.boxes_N4_xyxy, expected.boxes_N4_xyxy)
    torch.testing.assert_close(got.stability_score_N, expected.stability_score_N, rtol=0, atol=0, equal_nan=True)


def test_duplicates_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred discs, each a little beside the next: one stays, and only the first few are measured."""
    count = 0

    def counted(logits_KSS: torch.Tensor, *arguments: Any) -> Measured:
        nonlocal count
        count += len(logits_KSS)
        return measure(logits_KSS, *arguments)

    monkeypatch.setattr(selection, "measure", counted)
    embedding = embedding_of((200, 256), IMAGE_SIZE)
    y, x = torch.meshgrid(torch.arange(MASK_SIZE), torch.arange(MASK_SIZE), indexing="ij")
    discs = torch.stack([20.0 - torch.hypot(x - 25 - i / 100, y - 25.0) for i in range(100)])
    part = Found(discs, torch.linspace(1, 0.9, 100), torch.arange(100), bounds(discs, embedding, IMAGE_SIZE))
    crop = Crop(embedding, [0, 0, 256, 200], (200, 256))
    got = select([part], crop, IMAGE_SIZE, AmgConfig(stability_score_thresh=0)).candidates
    assert got.prompts_N.tolist() == [0]
    assert count == 32


def test_nothing_found_is_nothing_kept() -> None:
    embedding = embedding_of((200, 256), IMAGE_SIZE)
    [part] = found_in(embedding, np.array([[9.0, 9.0]]))
    none = Found(
        part.logits_NSS[:0],
        part.predicted_iou_N[:0],
        part.prompts_N[:0],
        Bounds(*(boxes[:0] for boxes in part.bounds)),
    )
    crop = Crop(embedding, [0, 0, 256, 200], (200, 256))
    assert len(select([none], crop, IMAGE_SIZE, AmgConfig()).candidates) == 0


@pytest.mark.parametrize("image_size", [64, 256])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_boxes_lie_within_their_bounds(size: tuple[int, int], image_size: int) -> None:
    embedding = embedding_of(size, image_size)
    random = torch.Generator().manual_seed(size[0])
    side = image_size // 4
    parts = []
    for cells in (2, 5, side):  # from large smooth masks to specks
        coarse = torch.randn(20, 1, cells, cells, generator=random) - 0.5
        parts.append(torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")[:, 0])
    parts += [torch.full((1, side, side), value) for value in (-2.0, 2.0)]
    logits = torch.cat(parts)
    boxes = measure(logits, embedding, image_size, 1.0).boxes_K4_xyxy
    inner, outer = bounds(logits, embedding, image_size)
    full = torch.cat(list(full_size_masks(logits, embedding, image_size, 2**30)))
    some = full.any(dim=(1, 2))
    assert (outer[some, :2] <= boxes[some, :2]).all()
    assert (outer[some, 2:] >= boxes[some, 2:]).all()
    sure = inner[:, 3] >= 0
    assert not sure[~some].any()
    assert (inner[sure, :2] >= boxes[sure, :2]).all()
    assert (inner[sure, 2:] <= boxes[sure, 2:]).all()
    assert inner[-2].tolist() == [0, 0, -1, -1]
    assert outer[-2].tolist() == [0, 0, 0, 0]
    assert outer[-1].tolist() == [0, 0, size[1] - 1, size[0] - 1]


def test_bounds_are_close_where_an_image_is_large() -> None:
    """Within the few pixels that three logits span."""
    embedding = embedding_of((600, 777), 256)
    coarse = torch.randn(30, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    logits = torch.nn.functional.interpolate(coarse, (64, 64), mode="bilinear", align_corners=True)[:, 0]
    inner, outer = bounds(logits, embedding, 256)
    sure = inner[:, 3] >= 0
    assert sure.float().mean() > 0.9
    assert (inner - outer)[sure].abs().float().mean() < 3 * 777 / 64


def test_certain_overlap() -> None:
    box = torch.tensor([[0, 0, 100, 100]])
    inner = torch.tensor([[10, 0, 100, 100], [10, 0, 100, 100], [0, 0, -1, -1], [0, 0, -1, -1]])
    outer = torch.tensor([[0, 0, 100, 100], [0, 0, 200, 100], [0, 0, 100, 100], [0, 0, 0, 0]])
    assert surely_overlap(box, Bounds(inner, outer), 0.7).tolist() == [True, False, False, False]
    assert surely_overlap(box, Bounds(inner, outer), 0.9).tolist() == [False] * 4
    assert surely_overlap(box[:0], Bounds(inner, outer), 0.7).tolist() == [False] * 4
