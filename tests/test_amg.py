"""Automatic mask generation on hand-drawn masks: both implementations get the same logits and must agree exactly.

The picture of these tests holds its own coordinates, so that a drawn model knows which crop it is shown.
"""

from typing import Any, Final, cast

import numpy as np
import pytest
import torch
from drawn_masks import ALL, GIB, DrawnModel, DrawnPredictor, coordinates_as_colours, ours, reference
from numpy.typing import NDArray
from pydantic import ValidationError
from seeded import Sam
from segment_anything import SamAutomaticMaskGenerator

from pipeline import rle
from pipeline.amg import MaskGenerator
from pipeline.model import load_model
from pipeline.model.sam import Predictions, PreparedImage, SamModel
from pipeline.model.weights import seeded_model


class WithoutMemory(DrawnModel):
    """A device on which only so many prompts fit."""

    def __init__(self, fitting: int, error: type[Exception] = torch.OutOfMemoryError) -> None:
        self.fitting = fitting
        self.error = error
        self.refused = 0

    def predict(self, image: PreparedImage, points_N2: NDArray[np.float64]) -> Predictions:
        if len(points_N2) > self.fitting:
            self.refused += 1
            raise self.error(f"{len(points_N2)} prompts")
        return super().predict(image, points_N2)


SETTINGS: Final[dict[str, dict[str, Any]]] = {
    "defaults": {"points_per_side": 6},
    "all": ALL,
    "predicted IoU, and a tie with the threshold": ALL | {"pred_iou_thresh": 0.88},
    "stability": ALL | {"stability_score_thresh": 0.9},
    "offset": ALL | {"stability_score_thresh": 0.9, "stability_score_offset": 0.2},
    "duplicates": ALL | {"box_nms_thresh": 0.7},
    "duplicates of little overlap": ALL | {"box_nms_thresh": 0.2},
    "crops": {"points_per_side": 4, "crop_n_layers": 1},
    "two layers": ALL | {"crop_n_layers": 2, "crop_n_points_downscale_factor": 2},
    "two layers, duplicates": ALL
    | {"crop_n_layers": 2, "crop_n_points_downscale_factor": 2, "box_nms_thresh": 0.8, "crop_nms_thresh": 0.4},
    "overlap": ALL | {"crop_n_layers": 1, "crop_overlap_ratio": 0.6},
    "no overlap": ALL | {"crop_n_layers": 1, "crop_overlap_ratio": 0.0},
    "regions": ALL | {"min_mask_region_area": 60, "box_nms_thresh": 0.95, "crop_nms_thresh": 0.9},
    "regions in crops": ALL | {"min_mask_region_area": 300, "crop_n_layers": 1, "crop_nms_thresh": 0.8},
    "regions larger than the image": ALL | {"min_mask_region_area": 10**6},
    "grids": ALL
    | {"points_per_side": None, "point_grids": [np.array([[0.2, 0.3], [0.9, 0.1]]), np.array([[0.5, 0.5]])]}
    | {"crop_n_layers": 1},
    "small batches": ALL | {"points_per_batch": 3},
}


def plain(masks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Comparable: an empty mask's stability score is NaN in both."""
    return [mask | {"stability_score": str(mask["stability_score"])} for mask in masks]


@pytest.mark.parametrize("size", [(120, 200), (333, 150)], ids=str)
@pytest.mark.parametrize("setting", SETTINGS)
def test_drawn_masks_are_the_references(setting: str, size: tuple[int, int]) -> None:
    rgb = coordinates_as_colours(*size)
    expected = reference(rgb, **SETTINGS[setting])
    assert expected
    assert plain(ours(rgb, **SETTINGS[setting])) == plain(expected)


@pytest.mark.parametrize("output_mode", ["binary_mask", "uncompressed_rle"])
def test_other_forms_of_drawn_masks_are_the_references(output_mode: str) -> None:
    rgb = coordinates_as_colours(150, 230)
    arguments = ALL | {"output_mode": output_mode, "crop_n_layers": 1}
    made, expected = ours(rgb, **arguments), reference(rgb, **arguments)
    assert len(made) == len(expected) > 50
    for a, b in zip(made, expected, strict=True):
        np.testing.assert_equal(a["segmentation"], b["segmentation"])
        assert type(a["segmentation"]) is type(b["segmentation"])


def test_every_filter_has_something_to_do() -> None:
    """Else the comparisons above would prove nothing."""
    rgb = coordinates_as_colours(120, 200)
    counts = {setting: len(reference(rgb, **SETTINGS[setting])) for setting in SETTINGS}
    assert counts["all"] == 75
    filtered = ["defaults", "stability", "offset", "duplicates", "duplicates of little overlap"]
    assert all(5 < counts[setting] < 70 for setting in filtered), counts
    assert len({counts[setting] for setting in filtered}) == len(filtered)
    assert counts["two layers, duplicates"] < counts["two layers"]
    everything, cleaned = (reference(rgb, **(ALL | {"min_mask_region_area": area})) for area in (0, 60))
    areas = [sorted(mask["area"] for mask in masks) for masks in (everything, cleaned)]
    assert areas[0] != areas[1]


def test_defaults_are_the_references() -> None:
    generator = SamAutomaticMaskGenerator(cast(Sam, DrawnPredictor.model))
    config = MaskGenerator(cast(SamModel, DrawnModel())).config.model_dump()
    assert config.pop("output_mode") == "coco_rle"
    assert config.pop("points_per_side") == 32
    assert config.pop("point_grids") is None
    assert config.pop("crop_n_points_downscale_factor") == 1
    config.pop("memory_budget")
    assert config.pop("keep_candidates") is False
    assert config.pop("points_per_batch") is None  # the device's
    assert load_model("demo", device="cpu").points_per_batch == generator.points_per_batch
    assert config == {name: getattr(generator, name) for name in config}
    assert len(generator.point_grids[0]) == 32**2


def test_memory_budget_does_not_change_the_masks() -> None:
    rgb = coordinates_as_colours(200, 310)
    arguments = ALL | {"crop_n_layers": 1}
    roomy = ours(rgb, **arguments, memory_budget=GIB)
    assert plain(ours(rgb, **arguments, memory_budget=1)) == plain(roomy)
    assert plain(ours(rgb, **arguments, memory_budget=400_000)) == plain(roomy)


@pytest.mark.parametrize(
    ("fitting", "error"), [(1, torch.OutOfMemoryError), (5, MemoryError), (24, torch.OutOfMemoryError)]
)
def test_case_38_out_of_memory_gives_the_same_masks_in_smaller_chunks(
    fitting: int, error: type[Exception]
) -> None:
    rgb = coordinates_as_colours(120, 200)
    model = WithoutMemory(fitting, error)
    assert plain(ours(rgb, model, **ALL)) == plain(ours(rgb, **ALL))
    assert model.refused


def test_prompts_that_did_not_fit_are_not_tried_again_with_the_same_image() -> None:
    model = WithoutMemory(3)
    generator = MaskGenerator(cast(SamModel, model), **ALL | {"points_per_batch": 24})
    for refused in (3, 6):  # 24, 12 and 6 of each image
        generator.generate(coordinates_as_colours(50, 50))
        assert model.refused == refused


def test_out_of_memory_for_one_prompt_is_said() -> None:
    with pytest.raises(torch.OutOfMemoryError, match="1 prompts"):
        ours(coordinates_as_colours(50, 50), WithoutMemory(0), **ALL)


def test_another_error_is_not_tried_with_fewer_prompts() -> None:
    model = WithoutMemory(0, RuntimeError)
    with pytest.raises(RuntimeError, match="prompts"):
        ours(coordinates_as_colours(50, 50), model, **ALL)
    assert model.refused == 1


@pytest.mark.parametrize("layers", [0, 2])
@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (2, 2)], ids=str)
def test_case_16_slivers(size: tuple[int, int], layers: int) -> None:
    rgb = np.full((*size, 3), 90, dtype=np.uint8)
    arguments = {"pred_iou_thresh": -10, "stability_score_thresh": 0, "points_per_side": 4}
    for regions in (0, 10):
        masks = ours(rgb, seeded_model(1, 64), **arguments, crop_n_layers=layers, min_mask_region_area=regions)
        for mask in masks:
            assert rle.decode(mask["segmentation"]).shape == size
            assert rle.decode(mask["segmentation"]).sum() == mask["area"]
            x, y, width, height = mask["bbox"]
            assert 0 <= x <= x + width < size[1]
            assert 0 <= y <= y + height < size[0]
    everything = ours(rgb, seeded_model(1, 64), **arguments, box_nms_thresh=1.0)
    assert len(everything) == 48


@pytest.mark.parametrize("value", [0, 128, 255])
def test_case_17_one_colour_everywhere(value: int) -> None:
    rgb = np.full((90, 120, 3), value, dtype=np.uint8)
    model = seeded_model(1, 64)
    assert ours(rgb, model, points_per_side=4) == []
    assert ours(rgb, model, points_per_side=4, pred_iou_thresh=-10, stability_score_thresh=0)


def test_case_19_thresholds_of_one_give_no_masks() -> None:
    arguments = {"pred_iou_thresh": 1.0, "stability_score_thresh": 1.0, "points_per_side": 8}
    for regions in (0, 50):
        assert (
            ours(coordinates_as_colours(90, 120), **arguments, crop_n_layers=1, min_mask_region_area=regions) == []
        )


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((9, 9, 3), dtype=np.float32),
        np.zeros((9, 9), dtype=np.uint8),
        np.zeros((9, 9, 4), dtype=np.uint8),
        np.zeros((3, 9, 9), dtype=np.uint8),
        np.zeros((9, 9, 3), dtype=np.int64),
    ],
    ids=lambda image: f"{image.dtype}{image.shape}",
)
def test_what_is_no_rgb_image_is_refused(image: Any) -> None:
    with pytest.raises(ValueError, match="uint8 H x W x 3"):
        ours(image)


@pytest.mark.parametrize(
    "arguments",
    [
        {"points_per_sides": 3},
        {"points_per_side": None},
        {"points_per_side": 3, "point_grids": [[[0.5, 0.5]]]},
        {"points_per_side": None, "point_grids": [[[0.5, 0.5]]], "crop_n_layers": 1},
        {"points_per_side": None, "point_grids": [[[1.5, 0.5]]]},
        {"output_mode": "png"},
        {"points_per_side": 0},
        {"points_per_side": 3, "crop_n_layers": 2, "crop_n_points_downscale_factor": 2},
        {"points_per_side": None, "point_grids": [[[0.5, 0.5]], []], "crop_n_layers": 1},
    ],
    ids=str,
)
def test_unknown_and_contradictory_arguments_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        MaskGenerator(cast(SamModel, DrawnModel()), **arguments)


def test_the_reference_takes_no_layer_without_points_either() -> None:
    rgb = coordinates_as_colours(50, 60)
    with pytest.raises(ZeroDivisionError):
        reference(rgb, points_per_side=3, crop_n_layers=2, crop_n_points_downscale_factor=2)
    with pytest.raises(KeyError):
        reference(
            rgb, points_per_side=None, point_grids=[np.array([[0.5, 0.5]]), np.empty((0, 2))], crop_n_layers=1
        )
    one_point = {"points_per_side": 4, "crop_n_layers": 2, "crop_n_points_downscale_factor": 2}
    assert plain(ours(rgb, **one_point)) == plain(reference(rgb, **one_point))
