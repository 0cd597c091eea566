"""The masks are the reference's to the pixel, once rounding is out of the way: both compute in float64.

In float32 a pixel whose logit is 0 but for rounding falls on either side, whether ours or the reference's
(`benchmarks/rounding.py`). In float64 no such pixel is left, and whatever else they did differently would show.
"""

from collections.abc import Iterator
from typing import Any, Final

import pytest
import torch
from pairs import (
    SETTINGS,
    SMALL_SIZE,
    Pair,
    assert_lively,
    few_prompts,
    float64_for_float32,
    pair,
    photographs,
    trained_pair,
)
from seeded import PHOTOGRAPHS, lively_state_dict

from pipeline.model import load_model

_ROUNDING: Final = 1e-12
"""Of float64 in a predicted IoU."""


@pytest.fixture(scope="module", autouse=True)
def _in_float64() -> Iterator[None]:
    lively_state_dict()  # made in float32, as elsewhere
    pair.cache_clear()
    trained_pair.cache_clear()
    with float64_for_float32():
        yield
    pair.cache_clear()
    trained_pair.cache_clear()


@pytest.mark.long
@pytest.mark.timeout(2400)  # beside other work it may take twenty minutes
def test_masks_of_trained_weights_with_every_default() -> None:
    assert_same_of_trained_weights("coffee")


def test_masks_of_trained_weights_with_fewer_points_on_a_large_photograph() -> None:
    assert_same_of_trained_weights("large", points_per_side=6)


@pytest.mark.parametrize("setting", SETTINGS)
@photographs("portrait", "square")
def test_masks_of_lively_weights(name: str, setting: str) -> None:
    arguments = few_prompts(SETTINGS[setting], side=6, side_in_crops=3)
    reference = assert_same(pair(SMALL_SIZE), name, arguments)
    assert_lively(reference, setting, prompts=36)


def assert_same_of_trained_weights(name: str, **arguments: Any) -> None:
    thresholds = load_model("demo", device="cpu", kernels=False).thresholds  # kernels have no float64
    assert len(assert_same(trained_pair(), name, {**thresholds, **arguments})) >= 5


def assert_same(both: Pair, name: str, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """The reference's masks, which ours are: as many, in the same order, of the same RLE."""
    assert {tensor.dtype for tensor in both.model.parameters()} == {torch.float64}
    ours, reference = both.masks(PHOTOGRAPHS[name](), **arguments)
    assert [mask["segmentation"] for mask in ours] == [mask["segmentation"] for mask in reference]
    for a, b in zip(ours, reference, strict=True):
        assert a == b | {
            "predicted_iou": pytest.approx(b["predicted_iou"], abs=_ROUNDING),
            "stability_score": pytest.approx(b["stability_score"], abs=0, nan_ok=True),
        }
    return reference
