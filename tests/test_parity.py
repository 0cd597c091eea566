"""The masks are the reference's: the package mobile_sam and ours, with the same weights, on photographs.

With the trained weights that come along, every default at the published size, with the full grid on one
photograph; with random weights that were made lively, all settings with fewer prompts, for time, there and at 256.
The full grid on as many photographs as one likes is `benchmarks/parity.py`'s. Rounding of float32 makes masks
differ by single pixels; test_exact_parity.py compares without it.
`EVERYMASK_PHOTOS` names a folder of more photographs to compare on.
"""

import os
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from pairs import KEEP_MANY, SETTINGS, SMALL_SIZE, assert_lively, few_prompts, pair, photographs, trained_pair
from PIL import Image
from pycocotools import mask as coco
from running import make_dataset, rows
from scipy.optimize import linear_sum_assignment
from seeded import (
    PHOTOGRAPHS,
    ReferenceGenerator,
    assert_parity,
    lively_state_dict,
    mask_ious,
    model_with,
)

from pipeline import rle
from pipeline.amg import MaskGenerator
from pipeline.config import AmgConfig, MasksConfig, ModelConfig
from pipeline.model import load_model
from pipeline.storage import canonical_uri

_ROUNDING: Final = 1e-5
"""Of float32 in a mask's logits, as a part of the largest."""


@pytest.fixture(scope="module", autouse=True)
def _forget() -> Any:
    yield
    pair.cache_clear()
    trained_pair.cache_clear()


@photographs("coffee", "portrait", "large", "gray", "square")
def test_encoder_gives_the_references_embedding(name: str) -> None:
    rgb = PHOTOGRAPHS[name]()
    both = pair(1024)
    both.predictor.set_image(rgb)
    ours = both.model.encode(rgb)
    assert ours.input_size == both.predictor.input_size
    assert ours.original_size == both.predictor.original_size
    assert both.predictor.features.std() > 0.1
    assert (ours.features_1CHW - both.predictor.features).abs().max() <= 1e-4


def test_photographs_are_told_apart() -> None:
    both = pair(1024)
    embeddings = [both.model.encode(PHOTOGRAPHS[name]()).features_1CHW for name in ("coffee", "portrait")]
    assert (embeddings[0] - embeddings[1]).std() > 0.1


@pytest.mark.parametrize("setting", ["defaults", "crops", "regions", "keep-many"])
@photographs("coffee", "portrait", "large", "gray")
def test_masks_at_the_published_size(name: str, setting: str) -> None:
    arguments = few_prompts(SETTINGS[setting], side=3, side_in_crops=2)
    ours, reference = pair(1024).masks(PHOTOGRAPHS[name](), **arguments)
    assert_parity(ours, reference, stray_pixels=1)
    large = np.array([mask["area"] > 1000 for mask in reference])  # where a stray pixel is no excuse
    assert (mask_ious(ours, reference)[large] >= 0.999).all()
    assert_lively(reference, setting, prompts=9)


@pytest.mark.parametrize("setting", SETTINGS)
@photographs("portrait", "square")
def test_masks_at_a_small_size(name: str, setting: str) -> None:
    arguments = few_prompts(SETTINGS[setting], side=6, side_in_crops=3)
    ours, reference = pair(SMALL_SIZE).masks(PHOTOGRAPHS[name](), **arguments)
    assert_parity(ours, reference, stray_pixels=2)
    assert_lively(reference, setting, prompts=36)


def test_these_are_the_decoders_that_runs_take() -> None:
    for both in (pair(SMALL_SIZE), trained_pair()):
        assert both.model.decoder_class is load_model("demo", device="cpu").decoder_class


@pytest.mark.long
@pytest.mark.timeout(2400)  # beside other work it may take twenty minutes
def test_masks_of_trained_weights_with_every_default() -> None:
    assert_parity_of_trained_weights("coffee")


def test_masks_of_trained_weights_with_every_default_but_fewer_points_on_a_large_photograph() -> None:
    """For time; with all of them they are `benchmarks/parity.py`'s."""
    assert_parity_of_trained_weights("large", points_per_side=8)


def assert_parity_of_trained_weights(name: str, **arguments: Any) -> None:
    """At the published size; their own thresholds are said to the reference.

    A pixel whose logit is 0 but for rounding may fall on either side, and no other. Few masks have one. So may one
    whose logit is a stability score's offset.
    """
    thresholds = load_model("demo", device="cpu").thresholds
    both = trained_pair()
    ours, reference = both.masks(PHOTOGRAPHS[name](), **thresholds, **arguments)
    assert len(reference) >= 5
    assert_parity(ours, reference, stray_pixels=1)
    equal, strays = 0, 0
    for a, b in zip(ours, reference, strict=True):
        if a["segmentation"] == b["segmentation"]:
            equal += 1
            continue
        logits_HW = both.logits_HW(b)
        differing_HW = rle.decode(a["segmentation"]) ^ rle.decode(b["segmentation"])
        assert logits_HW[differing_HW].abs().max() <= _ROUNDING * logits_HW.abs().max()
        strays += np.count_nonzero(differing_HW)
    assert mask_ious(ours, reference).min() >= 0.9999
    assert equal >= (0.8 if name == "large" else 0.9) * len(reference)
    assert strays <= 1e-5 * sum(mask["area"] for mask in reference)
    both.forget()


@pytest.mark.parametrize("setting", ["crops", "regions"])
def test_masks_of_trained_weights(setting: str) -> None:
    thresholds = load_model("demo", device="cpu").thresholds
    arguments = {**few_prompts(SETTINGS[setting], side=6, side_in_crops=3), **thresholds}
    ours, reference = trained_pair().masks(PHOTOGRAPHS["portrait"](), **arguments)
    assert_parity(ours, reference, stray_pixels=1)
    assert reference
    assert mask_ious(ours, reference).min() >= 0.999


def test_masks_of_the_full_grid_at_a_small_size() -> None:
    ours, reference = pair(SMALL_SIZE).masks(PHOTOGRAPHS["small"]())
    assert_parity(ours, reference, stray_pixels=2)
    assert 0 < len(reference) < 1000


def test_each_threshold_keeps_some_and_drops_some() -> None:
    """Else the comparisons above would prove nothing."""
    rgb = PHOTOGRAPHS["coffee"]()

    def count(**arguments: Any) -> int:
        return len(pair(SMALL_SIZE).masks(rgb, **{"points_per_side": 6, **KEEP_MANY, **arguments})[1])

    assert count() == 108
    assert 10 < count(pred_iou_thresh=0.88) < 98
    assert 10 < count(stability_score_thresh=0.95) < 98
    assert 10 < count(box_nms_thresh=0.7) < 98
    both, alone = (
        pair(SMALL_SIZE).masks(rgb, points_per_side=6, crop_n_layers=layers, **KEEP_MANY)[1] for layers in (1, 0)
    )
    crops = {tuple(mask["crop_box"]) for mask in both}
    assert len(crops) >= 4
    assert len(both) != len(alone)


def test_case_21_small_regions_are_removed_as_the_reference_removes_them() -> None:
    arguments = few_prompts(KEEP_MANY, side=3, side_in_crops=2)
    rgb = PHOTOGRAPHS["coffee"]()
    before, _ = pair(1024).masks(rgb, **arguments)
    after, reference = pair(1024).masks(rgb, min_mask_region_area=100, **arguments)
    assert_parity(after, reference, stray_pixels=1)
    assert sum(m["area"] for m in after) != sum(m["area"] for m in before)


@pytest.mark.parametrize("output_mode", ["binary_mask", "uncompressed_rle", "coco_rle"])
def test_output_modes_are_the_references_forms(output_mode: str) -> None:
    rgb = PHOTOGRAPHS["portrait"]()
    arguments = few_prompts(KEEP_MANY, side=3, side_in_crops=2) | {"output_mode": output_mode}
    ours, reference = pair(SMALL_SIZE).masks(rgb, **arguments)
    assert len(ours) == len(reference) == 27
    for a, b in zip(ours, reference, strict=True):
        assert type(a["segmentation"]) is type(b["segmentation"])
        assert {key: type(value) for key, value in a.items()} == {key: type(value) for key, value in b.items()}
        if output_mode == "binary_mask":
            assert a["segmentation"].dtype == b["segmentation"].dtype == np.bool_
            assert a["segmentation"].shape == rgb.shape[:2]
            assert (a["segmentation"] != b["segmentation"]).mean() <= 1e-4
        elif output_mode == "uncompressed_rle":
            assert a["segmentation"]["size"] == b["segmentation"]["size"] == list(rgb.shape[:2])
            assert sum(a["segmentation"]["counts"]) == sum(b["segmentation"]["counts"])
            assert abs(len(a["segmentation"]["counts"]) - len(b["segmentation"]["counts"])) <= 4
            assert {type(count) for count in a["segmentation"]["counts"]} == {int}
    if output_mode == "coco_rle":
        assert_parity(ours, reference, stray_pixels=2)


def test_batches_do_not_change_the_masks() -> None:
    rgb, model = PHOTOGRAPHS["gray"](), pair(SMALL_SIZE).model
    expected = MaskGenerator(model, points_per_side=6, **KEEP_MANY).generate(rgb)
    for batch in (1, 7, 1000):
        masks = MaskGenerator(model, points_per_side=6, points_per_batch=batch, **KEEP_MANY).generate(rgb)
        assert_parity(masks, expected, stray_pixels=2)


def test_a_checkpoint_of_the_reference_gives_its_masks(tmp_path: Path) -> None:
    both = pair(1024)
    path = tmp_path / "x.pt"
    torch.save(both.predictor.model.state_dict(), path)
    model = load_model(str(path), device="cpu")
    rgb = PHOTOGRAPHS["portrait"]()
    arguments = few_prompts(KEEP_MANY, side=3, side_in_crops=2)
    _, reference = both.masks(rgb, **arguments)
    assert_parity(MaskGenerator(model, **arguments).generate(rgb), reference, stray_pixels=1)


def test_a_dataset_of_the_references_checkpoint_holds_its_masks(tmp_path: Path) -> None:
    reference = pair(SMALL_SIZE).predictor.model
    torch.save(reference.state_dict(), tmp_path / "x.pt")
    (tmp_path / "in").mkdir()
    names = ("coffee", "portrait", "small")
    for name in names:
        Image.fromarray(PHOTOGRAPHS[name]()).save(tmp_path / "in" / f"{name}.png")
    config = MasksConfig(
        images=canonical_uri(str(tmp_path / "in")),
        output=canonical_uri(str(tmp_path / "out")),
        images_per_shard=2,
        model=ModelConfig(image_size=SMALL_SIZE),
        amg=AmgConfig(points_per_side=6),
    )
    make_dataset(config, tmp_path / "x.pt")
    generator = ReferenceGenerator(reference, points_per_side=6)
    found = rows(tmp_path / "out")
    assert [Path(row["uri"]).stem for row in found] == list(names)
    for row in found:
        expected = generator.generate(PHOTOGRAPHS[Path(row["uri"]).stem]())
        assert expected
        assert_parity(row["masks"], expected)


def test_bfloat16_gives_nearly_the_masks_of_float32() -> None:
    """Matched one to one by mask IoU; the mean of what is matched."""
    rgb = PHOTOGRAPHS["coffee"]()
    arguments = few_prompts(KEEP_MANY, side=6, side_in_crops=2)
    half = model_with(lively_state_dict(), SMALL_SIZE, "bf16")
    fast = MaskGenerator(half, **arguments).generate(rgb)
    exact, _ = pair(SMALL_SIZE).masks(rgb, **arguments)
    assert len(fast) == len(exact) == 108
    ious = coco.iou([m["segmentation"] for m in fast], [m["segmentation"] for m in exact], [0] * len(exact))
    matched = ious[linear_sum_assignment(-ious)]
    assert matched.mean() > 0.8
    assert matched.mean() < 1  # else it was float32
    differences = np.subtract(sorted(m["predicted_iou"] for m in fast), sorted(m["predicted_iou"] for m in exact))
    assert np.abs(differences).max() < 0.05


if "EVERYMASK_PHOTOS" in os.environ:
    _FILES = sorted(Path(os.environ["EVERYMASK_PHOTOS"]).iterdir())

    @pytest.mark.parametrize("setting", SETTINGS)
    @pytest.mark.parametrize("path", _FILES, ids=lambda path: path.name)
    def test_masks_of_a_folders_photographs(path: Path, setting: str) -> None:
        rgb = np.array(Image.open(path).convert("RGB"))
        arguments = few_prompts(SETTINGS[setting], side=3, side_in_crops=2)
        ours, reference = pair(1024).masks(rgb, **arguments)
        assert_parity(ours, reference, stray_pixels=1)
        assert reference
