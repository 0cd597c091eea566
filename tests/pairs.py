"""The reference and our model side by side, with the same weights, for tests of parity.

They remember what they encoded and decoded, as the same photograph is looked at with several settings.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Final

import numpy as np
import pytest
import torch
from seeded import (
    ReferenceGenerator,
    Rgb,
    Sam,
    SamPredictor,
    grid,
    lively_state_dict,
    model_with,
    reference_with,
)

from pipeline import rle
from pipeline.amg import MaskGenerator, bounds, measure, resize
from pipeline.model import products
from pipeline.model.native import native_decoder
from pipeline.model.sam import Embedding, SamModel
from pipeline.model.weights import read_checkpoint

KEEP_MANY: Final = {"pred_iou_thresh": -10.0, "stability_score_thresh": 0.0, "box_nms_thresh": 1.0}
SETTINGS: Final[dict[str, dict[str, Any]]] = {
    "defaults": {},
    "crops": {"crop_n_layers": 1},
    "crops, keep-many": {"crop_n_layers": 1, **KEEP_MANY},
    "regions": {"min_mask_region_area": 100},
    "keep-many": KEEP_MANY,
}
SMALL_SIZE: Final = 256


def photographs(*names: str) -> Any:
    """Parameters `name`; one process takes all tests of a photograph, and remembers what it encoded."""
    return pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.xdist_group(n)) for n in names])


class RememberingPredictor(SamPredictor):  # type: ignore[misc]  # it has no types
    """The reference's predictor, which does not encode or decode the same thing twice."""

    features: torch.Tensor

    def __init__(self, sam: Sam) -> None:
        super().__init__(sam)
        self.encoded: dict[bytes, torch.Tensor] = {}
        self.decoded: dict[tuple[bytes, bytes], tuple[torch.Tensor, torch.Tensor]] = {}
        self.key = b""

    def set_torch_image(self, transformed_image: torch.Tensor, original_image_size: tuple[int, ...]) -> None:
        self.key = transformed_image.numpy().tobytes()
        if self.key not in self.encoded:
            super().set_torch_image(transformed_image, original_image_size)
            self.encoded[self.key] = self.features
        self.features = self.encoded[self.key]
        self.original_size = original_image_size
        self.input_size = tuple(transformed_image.shape[-2:])
        self.is_image_set = True

    def predict_torch(
        self, point_coords: torch.Tensor, labels: torch.Tensor, **keywords: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        key = self.key, point_coords.numpy().tobytes()
        if key not in self.decoded:
            masks, iou, logits = self.decode(point_coords, labels, **keywords)
            self.decoded[key] = iou, logits
            return masks, iou, logits
        iou, logits = self.decoded[key]
        return self.model.postprocess_masks(logits, self.input_size, self.original_size), iou, logits

    def decode(self, points: torch.Tensor, labels: torch.Tensor, **keywords: Any) -> tuple[torch.Tensor, ...]:
        """In float64 a few points at a time, which is a third faster and gives the same answers."""
        at_once = 16 if self.features.itemsize == 8 else len(points)
        answers = []
        for part, of_part in zip(torch.split(points, at_once), torch.split(labels, at_once), strict=True):
            answers.append(super().predict_torch(part, of_part, **keywords))
        return tuple(torch.cat(parts) for parts in zip(*answers, strict=True))


class RememberingModel(SamModel):
    """Our model, which does not encode the same picture twice."""

    def encode(self, rgb_HW3: Rgb) -> Embedding:
        memory: dict[tuple[object, ...], Embedding] = self.__dict__.setdefault("memory", {})
        key = rgb_HW3.shape, rgb_HW3.tobytes()
        if key not in memory:
            memory[key] = super().encode(rgb_HW3)
        return memory[key]


class Pair:
    """Both implementations with the same weights."""

    def __init__(self, image_size: int, weights: dict[str, torch.Tensor]) -> None:
        self.predictor = RememberingPredictor(reference_with(weights, image_size))
        self.model = model_with(weights, image_size)
        self.model.__class__ = RememberingModel
        if next(self.model.parameters()).itemsize == 4:  # the kernels have no float64
            self.model.decoder_class = native_decoder(self.model.fast_decoder)

    def masks(self, rgb: Rgb, **arguments: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Ours and the reference's."""
        reference = ReferenceGenerator(self.predictor.model, **arguments)
        reference.predictor = self.predictor
        arguments.setdefault("output_mode", "coco_rle")
        return MaskGenerator(self.model, **arguments).generate(rgb), reference.generate(rgb)

    def logits_HW(self, mask: dict[str, Any]) -> torch.Tensor:
        """Those of one of the reference's masks, at the image's size. Its predicted IoU tells which it is."""
        for iou_N3, logits_N3LL in self.predictor.decoded.values():
            for prompt, which in (iou_N3 == mask["predicted_iou"]).nonzero():
                logits = logits_N3LL[prompt, which][None, None]
                whole_HW: torch.Tensor = self.predictor.model.postprocess_masks(
                    logits, self.predictor.input_size, self.predictor.original_size
                )[0, 0]
                if np.array_equal(rle.decode(mask["segmentation"]), (whole_HW > 0).numpy()):
                    return whole_HW
        raise AssertionError("the reference has decoded no such mask")

    def forget(self) -> None:
        """What was encoded and decoded: the full grid's logits are 800 MB a photograph."""
        self.predictor.encoded.clear()
        self.predictor.decoded.clear()
        self.model.__dict__.pop("memory", None)


@lru_cache
def pair(image_size: int) -> Pair:
    """Both implementations at one size, with lively weights."""
    return Pair(image_size, lively_state_dict())


@lru_cache
def trained_pair() -> Pair:
    """Both implementations at the published size, with the weights that come along."""
    return Pair(1024, dict(read_checkpoint("demo").tensors))


@contextmanager
def float64_for_float32() -> Iterator[None]:
    """Whatever is made in here, by both implementations as they are written, is float64 where they say float32."""
    tables = resize.resize_matrix, bounds._line, measure._axis
    before = torch.get_default_dtype()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("float", "float32"):
            patch.setattr(torch, name, torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        for library in ("_ONEDNN", "_LINEAR"):  # has no float64
            patch.setattr(products, library, None)
        for table in tables:
            table.cache_clear()
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(before)
            for table in tables:
                table.cache_clear()


def few_prompts(settings: dict[str, Any], side: int, side_in_crops: int) -> dict[str, Any]:
    """Settings with a coarser grid."""
    sides = [side, *([side_in_crops] * settings.get("crop_n_layers", 0))]
    return settings | {"points_per_side": None, "point_grids": [grid(n) for n in sides]}


def assert_lively(reference: list[dict[str, Any]], setting: str, prompts: int) -> None:
    """The comparison proved something: masks were kept, and some dropped by all but keep-many."""
    if setting == "keep-many":
        assert len(reference) == 3 * prompts
    elif setting == "crops, keep-many":
        assert len({tuple(mask["crop_box"]) for mask in reference}) >= 3
    else:
        assert 0 < len(reference) < 3 * prompts
