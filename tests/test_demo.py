"""The weights that come along: what they are, that both implementations agree on them, that they find things."""

import numpy as np
import pytest
import safetensors
from seeded import PHOTOGRAPHS, ReferenceGenerator, assert_parity, mask_ious, reference_with

from pipeline.amg import MaskGenerator
from pipeline.amg.selfcheck import checked_model
from pipeline.config import AmgConfig, ModelConfig
from pipeline.evaluation import against_masks
from pipeline.evaluation.pictures import scene_pictures
from pipeline.model import SamModel, load_model
from pipeline.model.sam import THRESHOLDS
from pipeline.model.weights import DEMO, read_checkpoint

MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def demo() -> SamModel:
    return checked_model(ModelConfig(model="demo", device="cpu"))


def test_they_are_small_halves_for_512_pixels(demo: SamModel) -> None:
    assert DEMO.stat().st_size <= 24 * MEGABYTE
    with safetensors.safe_open(DEMO, "pt") as file:
        kinds = {file.get_slice(name).get_dtype() for name in file.keys() if "num_batches" not in name}  # noqa: SIM118
    assert kinds == {"F16"}
    assert (demo.architecture, demo.image_size) == ("mobile_sam", 512)
    assert demo.thresholds.keys() == THRESHOLDS.keys()
    assert demo.thresholds != THRESHOLDS
    assert load_model(str(DEMO), device="cpu").weights_sha256 == demo.weights_sha256


@pytest.mark.parametrize("setting", [{}, {"crop_n_layers": 1}, {"min_mask_region_area": 100}])
@pytest.mark.parametrize("name", ["coffee", "portrait"])
def test_both_implementations_find_the_same_masks(name: str, setting: dict[str, int], demo: SamModel) -> None:
    """At 1024 with every default but the grid's, whose size is the reference's seconds."""
    weights = {key: t.float() if t.is_floating_point() else t for key, t in DEMO_TENSORS.items()}
    arguments = {**setting, **demo.thresholds, "points_per_side": 6, "crop_n_points_downscale_factor": 2}
    rgb = PHOTOGRAPHS[name]()
    reference = ReferenceGenerator(reference_with(weights, 1024), **arguments).generate(rgb)
    masks = MaskGenerator(load_model("demo", device="cpu", image_size=1024), **arguments).generate(rgb)
    assert_parity(masks, reference, stray_pixels=1)
    assert reference
    assert mask_ious(masks, reference).min() >= 0.999


DEMO_TENSORS = read_checkpoint("demo").tensors


@pytest.mark.parametrize("name", ["coffee", "portrait", "large"])
def test_they_find_a_sensible_number_of_masks(name: str, demo: SamModel) -> None:
    assert 5 <= len(MaskGenerator(demo, points_per_side=16).generate(PHOTOGRAPHS[name]())) <= 400


def test_one_click_finds_a_part_of_a_synthetic_thing(demo: SamModel) -> None:
    """Scenes that it was not trained on; docs/model-card.md has the figures of many more."""
    config = AmgConfig(points_per_side=2)
    scores = against_masks.measure({"demo": demo}, scene_pictures(6), config, with_felzenszwalb=False)["demo"]
    best = np.concatenate([score.clicks.best_N for score in scores])
    assert len(best) > 30
    assert best.mean() > 0.3
