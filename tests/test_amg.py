"""Automatic mask generation on hand-drawn masks: both implementations get the same logits and must agree exactly.

The picture of these tests holds its own coordinates, so that a drawn model knows which crop it is shown.
"""

import subprocess
import sys
import tracemalloc
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, Final, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from seeded import ReferenceGenerator, Rgb, Sam
from segment_anything import SamAutomaticMaskGenerator
from segment_anything.utils.amg import (
    batched_mask_to_box,
    calculate_stability_score,
    coco_encode_rle,
    mask_to_rle_pytorch,
    rle_to_mask,
)
from segment_anything.utils.transforms import ResizeLongestSide

from pipeline.amg import MaskGenerator, filters, rle
from pipeline.amg.candidates import Candidates
from pipeline.amg.measure import measure
from pipeline.amg.resize import full_size_masks
from pipeline.model.decoder import Image
from pipeline.model.sam import THRESHOLDS, Embedding, Predictions, PreparedImage, SamModel
from pipeline.model.weights import seeded_model

IMAGE_SIZE: Final = 256
MASK_SIZE: Final = IMAGE_SIZE // 4
GIB: Final = 2**30


def coordinates_as_colours(height: int, width: int) -> Rgb:
    """A picture whose pixels say where they are."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x & 255, y & 255, (x >> 8) << 4 | y >> 8], axis=2).astype(np.uint8)


def corner(rgb: Rgb) -> tuple[int, int]:
    """x and y of the first pixel of a crop of such a picture."""
    red, green, blue = (int(value) for value in rgb[0, 0])
    return (blue >> 4) << 8 | red, (blue & 15) << 8 | green


def draw(origin: tuple[int, int], points_N2: NDArray[np.float64]) -> tuple[torch.Tensor, torch.Tensor]:
    """Three masks and predicted IoUs for each prompt in the model's frame, decided by place alone.

    Discs of many sizes and contrasts, rings with an island, specks, slightly shifted duplicates, nothing,
    everything; predicted IoUs with many ties.
    """
    y, x = np.mgrid[:MASK_SIZE, :MASK_SIZE] * 4 + 1.7
    logits, ious = [], []
    for px, py in np.round(points_N2, 6):
        random = np.random.default_rng([*origin, int(px * 10), int(py * 10)])
        for _ in range(3):
            centre_x, centre_y = random.choice([px, py, 80.3, 131.7]), random.choice([py, py, 61.1])
            distance = np.hypot(x - centre_x, y - centre_y)
            radius = random.choice([6.1, 14.3, 31.7, 60.9])
            shape = random.integers(8)
            if shape == 0:
                inside = np.maximum(0.35 * radius - distance, 3.1 - np.hypot(x - centre_x - radius, y - centre_y))
                inside = np.maximum(inside, radius / 5 - abs(distance - 0.8 * radius))
            elif shape == 1:  # specks
                inside = 2.3 - 7 * random.random((MASK_SIZE, MASK_SIZE)) ** 0.3 + (distance < radius) * 4.2
            elif shape == 2:
                inside = np.full((MASK_SIZE, MASK_SIZE), random.choice([-3.3, 3.3]))
            elif shape == 3:
                inside = radius - np.maximum(abs(x - centre_x), abs(y - centre_y))
            else:
                inside = radius - distance
            logits.append(inside * random.choice([0.05, 0.3, 1.0, 5.0]) + 0.0137)
            ious.append(random.choice([0.5, 0.86, 0.88, 0.9, 0.9, 0.95, 1.0]))
    return torch.tensor(np.array(logits)).float().view(-1, 3, MASK_SIZE, MASK_SIZE), torch.tensor(
        ious
    ).float().view(-1, 3)


class DrawnModel:
    """What `MaskGenerator` asks of a `SamModel`."""

    image_size = IMAGE_SIZE
    mask_size = MASK_SIZE
    device = torch.device("cpu")
    precision = "fp32"
    thresholds = THRESHOLDS

    def encode(self, rgb_HW3: Rgb) -> Embedding:
        size = ResizeLongestSide.get_preprocess_shape(*rgb_HW3.shape[:2], IMAGE_SIZE)
        return Embedding(torch.tensor([[[corner(rgb_HW3)]]]), rgb_HW3.shape[:2], size)

    def prepare(self, embedding: Embedding) -> PreparedImage:
        return PreparedImage(embedding, cast(Image, None))

    def predict(self, image: PreparedImage, points_N2: NDArray[np.float64]) -> Predictions:
        points = ResizeLongestSide(IMAGE_SIZE).apply_coords(points_N2, image.embedding.original_size)
        x, y = image.embedding.features_1CHW.flatten().tolist()
        logits, iou = draw((x, y), points)
        return Predictions(image, iou, logits, [])

    def upscale(self, predictions: Predictions, wanted_N3: torch.Tensor) -> torch.Tensor:
        return predictions.mask_tokens_N3C[wanted_N3]


class DrawnPredictor:
    """What the reference's generator asks of its predictor."""

    device = torch.device("cpu")
    model = SimpleNamespace(mask_threshold=0.0, image_encoder=SimpleNamespace(img_size=IMAGE_SIZE))
    transform = ResizeLongestSide(IMAGE_SIZE)

    def set_image(self, rgb: Rgb) -> None:
        self.origin = corner(rgb)
        self.original_size = rgb.shape[:2]
        self.input_size = self.transform.get_preprocess_shape(*rgb.shape[:2], IMAGE_SIZE)

    def reset_image(self) -> None:
        del self.origin

    def predict_torch(
        self, points_N12: torch.Tensor, labels_N1: torch.Tensor, multimask_output: bool, return_logits: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        assert multimask_output
        assert return_logits
        assert labels_N1.eq(1).all()
        logits, iou = draw(self.origin, points_N12[:, 0].numpy())
        sam = cast(Sam, self.model)
        return Sam.postprocess_masks(sam, logits, self.input_size, self.original_size), iou, logits


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


def ours(rgb: Rgb, model: Any = None, **arguments: Any) -> list[dict[str, Any]]:
    return MaskGenerator(model or cast(SamModel, DrawnModel()), **arguments).generate(rgb)


def reference(rgb: Rgb, **arguments: Any) -> list[dict[str, Any]]:
    generator = ReferenceGenerator(cast(Sam, DrawnPredictor.model), **arguments)
    generator.predictor = DrawnPredictor()
    masks: list[dict[str, Any]] = generator.generate(rgb)
    return masks


ALL: Final = {
    "points_per_side": 5,
    "pred_iou_thresh": 0.0,
    "stability_score_thresh": 0.0,
    "box_nms_thresh": 1.0,
    "crop_nms_thresh": 1.0,
}
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
    assert config == {name: getattr(generator, name) for name in config}
    assert len(generator.point_grids[0]) == 32**2


def test_memory_budget_does_not_change_the_masks() -> None:
    rgb = coordinates_as_colours(200, 310)
    arguments = ALL | {"crop_n_layers": 1}
    roomy = ours(rgb, **arguments, memory_budget=GIB)
    assert plain(ours(rgb, **arguments, memory_budget=1)) == plain(roomy)
    assert plain(ours(rgb, **arguments, memory_budget=400_000)) == plain(roomy)


def test_memory_budget_bounds_how_many_masks_are_made_at_once() -> None:
    embedding = DrawnModel().encode(coordinates_as_colours(500, 400))
    logits = draw((0, 0), np.array([[9.0, 9.0]] * 10))[0].flatten(0, 1)

    def sizes(budget: int) -> list[int]:
        return [len(masks) for masks in full_size_masks(logits, embedding, IMAGE_SIZE, budget)]

    one_mask = 500 * 400 + 4 * 500 * MASK_SIZE
    assert sizes(GIB) == [30]
    assert sizes(1) == [1] * 30
    assert sizes(4 * one_mask) == [4] * 7 + [2]


@pytest.mark.parametrize(
    ("fitting", "error"), [(1, torch.OutOfMemoryError), (5, MemoryError), (24, torch.OutOfMemoryError)]
)
def test_out_of_memory_gives_the_same_masks_in_smaller_chunks(fitting: int, error: type[Exception]) -> None:
    rgb = coordinates_as_colours(120, 200)
    model = WithoutMemory(fitting, error)
    assert plain(ours(rgb, model, **ALL)) == plain(ours(rgb, **ALL))
    assert model.refused


def test_out_of_memory_for_one_prompt_is_said() -> None:
    with pytest.raises(torch.OutOfMemoryError, match="1 prompts"):
        ours(coordinates_as_colours(50, 50), WithoutMemory(0), **ALL)


def test_another_error_is_not_tried_with_fewer_prompts() -> None:
    model = WithoutMemory(0, RuntimeError)
    with pytest.raises(RuntimeError, match="prompts"):
        ours(coordinates_as_colours(50, 50), model, **ALL)
    assert model.refused == 1


SIZES: Final = [(1, 1), (1, 5000), (5000, 1), (2, 3), (37, 1000), (900, 61), (256, 256), (130, 90), (600, 777)]


@pytest.mark.parametrize("image_size", [64, 256])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_resized_masks_are_those_of_two_interpolations(size: tuple[int, int], image_size: int) -> None:
    """As `Sam.postprocess_masks` does it, and scores and boxes as `segment_anything.utils.amg`."""
    height, width = (max(1, side) for side in ResizeLongestSide.get_preprocess_shape(*size, image_size))
    random = torch.Generator().manual_seed(height * 7919 + width)
    coarse = torch.randn(9, 1, 10, 10, generator=random)
    logits = torch.nn.functional.interpolate(coarse, (image_size // 4,) * 2, mode="bicubic") * 3
    logits[0], logits[1] = -2.0, 2.0  # nothing, everything
    sam = cast(Sam, SimpleNamespace(image_encoder=SimpleNamespace(img_size=image_size)))
    expected = Sam.postprocess_masks(sam, logits, (height, width), size)[:, 0]
    assert expected.shape == (9, *size)

    embedding = Embedding(torch.empty(1), size, (height, width))
    for budget in (1, GIB):
        masks = torch.cat(list(full_size_masks(logits[:, 0], embedding, image_size, budget))).transpose(1, 2)
        differ = masks != (expected > 0)
        assert expected[differ].abs().max().item() < 1e-4 if differ.any() else True
        assert differ.float().mean() < 1e-4
    for offset in (-0.5, 0, 0.5, 2):
        measured = measure(logits[:, 0], embedding, image_size, offset)
        torch.testing.assert_close(
            measured.stability_score_K,
            calculate_stability_score(expected, 0.0, offset),
            atol=1e-4,
            rtol=0,
            equal_nan=True,
        )
        assert torch.equal(measured.boxes_K4_xyxy, batched_mask_to_box(masks))


@pytest.mark.parametrize("layers", [0, 2])
@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (2, 2)], ids=str)
def test_slivers(size: tuple[int, int], layers: int) -> None:
    """Case 16."""
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
def test_one_colour_everywhere(value: int) -> None:
    """Case 17."""
    rgb = np.full((90, 120, 3), value, dtype=np.uint8)
    model = seeded_model(1, 64)
    assert ours(rgb, model, points_per_side=4) == []
    assert ours(rgb, model, points_per_side=4, pred_iou_thresh=-10, stability_score_thresh=0)


def test_thresholds_of_one_give_no_masks() -> None:
    """Case 19."""
    arguments = {"pred_iou_thresh": 1.0, "stability_score_thresh": 1.0, "points_per_side": 8}
    for regions in (0, 50):
        assert (
            ours(coordinates_as_colours(90, 120), **arguments, crop_n_layers=1, min_mask_region_area=regions) == []
        )


MEASURE_PEAK: Final = """
import numpy as np
from pathlib import Path
from pipeline.amg import MaskGenerator
from pipeline.model.weights import seeded_model

def mebibytes(what):
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(what)).split()[1]) // 1024

rgb = np.zeros((12_000, 12_000, 3), dtype=np.uint8)
rgb[3000:9000, 2000:7000] = 200
model = seeded_model(1, 64)
generator = MaskGenerator(
    model, points_per_side=2, pred_iou_thresh=-10, stability_score_thresh=0, box_nms_thresh=1.0,
    memory_budget=2**28,
)
generator.generate(rgb[:64, :64])
before = mebibytes("VmRSS")
masks = generator.generate(rgb)
assert len(masks) == 12, len(masks)
assert all(mask["segmentation"]["size"] == [12_000, 12_000] for mask in masks)
print(mebibytes("VmHWM") - before)
"""


def test_memory_for_a_huge_image_is_bounded() -> None:
    """Case 18: 12 masks of 137 MiB each, 256 MiB allowed for them; the rest is Pillow's copy of the image."""
    done = subprocess.run([sys.executable, "-c", MEASURE_PEAK], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pillows_copies = 12_000**2 * (3 + 4) / 2**20
    assert float(done.stdout) < 256 + pillows_copies + 200


def test_mask_with_hole_and_islands_survives_rle() -> None:
    """Case 20."""
    mask = np.zeros((40, 60), dtype=bool)
    mask[5:30, 5:40] = True
    mask[10:20, 12:30] = False
    mask[13:15, 15:18] = True
    mask[35:, 55:] = True
    mask[0, 0] = True
    for pixels in (mask, ~mask, np.zeros_like(mask), np.ones_like(mask), mask[:1, :1], ~mask[:1, :1]):
        encoded = rle.encode(pixels)
        np.testing.assert_array_equal(rle.decode(encoded), pixels)
        assert rle.area(encoded) == pixels.sum()
        assert rle.uncompressed(encoded) == mask_to_rle_pytorch(torch.tensor(pixels)[None])[0]


def test_random_masks_are_encoded_as_the_reference_encodes_them() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        height, width = random.integers(1, 60, 2)
        pixels = random.random((height, width)) < random.choice([0.0, 0.02, 0.5, 0.98, 1.0])
        encoded, expected = rle.encode(pixels), mask_to_rle_pytorch(torch.tensor(pixels)[None])[0]
        assert rle.uncompressed(encoded) == expected
        assert encoded == coco_encode_rle(expected)
        np.testing.assert_array_equal(rle.decode(encoded), rle_to_mask(expected))


def test_masks_of_a_crop_are_encoded_in_the_image() -> None:
    random = np.random.default_rng(0)
    crop = torch.tensor(random.random((3, 20, 10)) < 0.5)  # K x W x H
    encoded = rle.encode_in_image(crop, [5, 7, 25, 17], (30, 40))
    for one, pixels in zip(encoded, crop, strict=True):
        expected = np.zeros((30, 40), dtype=bool)
        expected[7:17, 5:25] = pixels.numpy().T
        np.testing.assert_array_equal(rle.decode(one), expected)


def test_masks_of_a_crop_take_one_mask_of_the_image_at_a_time() -> None:
    height, width = 3000, 4000
    crop = torch.ones(64, 100, 100, dtype=torch.bool)
    tracemalloc.start()
    encoded = rle.encode_in_image(crop, [500, 500, 600, 600], (height, width))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [rle.area(one) for one in encoded] == [100 * 100] * 64
    assert peak < 1.5 * height * width


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


def candidates(boxes: list[list[int]], ious: list[float]) -> Candidates:
    count = len(boxes)
    return Candidates(
        torch.zeros(count, 4, 4),
        torch.tensor(ious),
        torch.linspace(0.5, 1, count),
        torch.tensor(boxes).view(-1, 4),
        torch.arange(count),
    )


def test_suppression_keeps_the_best_of_overlapping_boxes() -> None:
    """Box IoU of the first two is 0.81, of the first and third 0.5."""
    some = candidates(
        [[0, 0, 90, 90], [0, 0, 100, 81], [0, 0, 50, 81], [200, 200, 210, 210]], [0.8, 0.9, 0.7, 0.95]
    )
    assert filters.distinct(some, 0.7).prompts_N.tolist() == [3, 1, 2]
    assert filters.distinct(some, 0.3).prompts_N.tolist() == [3, 1]
    assert filters.distinct(some, 1.0).prompts_N.tolist() == [3, 1, 0, 2]
    assert len(filters.distinct(candidates([], []), 0.7)) == 0


def test_masks_cut_by_a_crop_are_dropped_but_not_those_at_the_images_edge() -> None:
    boxes = [[0, 0, 30, 30], [60, 30, 99, 59], [60, 30, 79, 59], [30, 0, 40, 79], [30, 0, 40, 59]]
    some = candidates(boxes, [0.5] * 5)
    kept = filters.whole(some, [0, 0, 100, 80], (200, 300))  # crop at the image's upper left corner
    assert kept.prompts_N.tolist() == [0, 2, 4]
    assert len(filters.whole(some, [0, 0, 100, 80], (80, 100))) == 5


def test_stability_threshold_is_inclusive_and_zero_keeps_what_has_none() -> None:
    some = candidates([[0, 0, 1, 1]] * 3, [0.5] * 3)
    some = replace(some, stability_score_N=torch.tensor([0.95, torch.nan, 0.9]))
    assert filters.stable(some, float(torch.tensor(0.95))).prompts_N.tolist() == [0]
    assert len(filters.stable(some, 0.0)) == 3


def test_best_predicted_iou_comes_first() -> None:
    masks = ours(coordinates_as_colours(120, 200), **ALL)
    assert len(masks) > 10
    assert all(a["predicted_iou"] >= b["predicted_iou"] for a, b in pairwise(masks))
