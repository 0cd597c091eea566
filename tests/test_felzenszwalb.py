"""Felzenszwalb's segmentation as a method beside the models."""

import numpy as np
from known_masks import KEEP_ALL, blobs, box
from seeded import PHOTOGRAPHS, lively_state_dict, model_with

from pipeline import rle
from pipeline.config import AmgConfig
from pipeline.evaluation import against_masks, felzenszwalb, metrics
from pipeline.evaluation.pictures import Picture


def test_felzenszwalb_finds_what_colours_tell() -> None:
    rgb = np.zeros((90, 120, 3), np.uint8)
    rgb[:, 60:] = 255
    square = box((90, 120), 20, 20, 45, 45)
    rgb[square] = (200, 30, 30)
    masks = np.stack([square, box((90, 120), 0, 60, 90, 120)])
    divided = felzenszwalb.partitions(rgb)
    answers = felzenszwalb.answer_clicks(divided, np.array([[32.0, 32.0], [90.0, 45.0]]))
    scores = against_masks.click_scores(answers, masks)
    assert scores.best_N.min() > 0.8
    found = [rle.decode(mask) for mask in felzenszwalb.proposals(divided)]
    assert metrics.mask_iou(np.stack(found)[:, None], masks[None]).max(axis=0).min() > 0.8
    assert len({mask.tobytes() for mask in found}) == len(found)


def test_felzenszwalb_shows_coarse_and_large_segments_first() -> None:
    divided = felzenszwalb.partitions(PHOTOGRAPHS["small"]())
    found = [rle.decode(mask) for mask in felzenszwalb.proposals(divided)]
    coarsest = np.bincount(divided[1600].ravel())
    assert len(coarsest) < len(np.unique(divided[50]))
    for mask, label in zip(found, np.argsort(-coarsest, kind="stable"), strict=False):
        np.testing.assert_array_equal(mask, divided[1600] == label)


def test_felzenszwalb_chooses_the_middle_scale() -> None:
    divided = felzenszwalb.partitions(PHOTOGRAPHS["small"]())
    [answer] = felzenszwalb.answer_clicks(divided, np.array([[30.0, 50.0]])).chosen_NHW
    np.testing.assert_array_equal(answer, divided[400] == divided[400][50, 30])


def test_felzenszwalb_may_show_as_many_masks_as_the_model() -> None:
    rgb = PHOTOGRAPHS["small"]()
    config = AmgConfig(**dict(KEEP_ALL, points_per_side=1))
    scores = against_masks.measure(
        {"model": model_with(lively_state_dict(), 64)},
        [Picture("", rgb, (blobs(3, 150, 226),))],
        config,
        with_felzenszwalb=True,
    )
    masks = {name: of_method[0].proposals.masks for name, of_method in scores.items()}
    assert masks["model"] == masks[against_masks.AS_MANY] == 3
    assert masks[against_masks.ALL] > 20
