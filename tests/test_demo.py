"""The weights that come along: what they are, and that they find things. test_parity.py compares their masks.

`EVERYMASK_PHOTOS` names a folder of more photographs.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import safetensors
from PIL import Image
from seeded import PHOTOGRAPHS

from pipeline.amg import MaskGenerator
from pipeline.amg.selfcheck import checked_model
from pipeline.config import AmgConfig, ModelConfig
from pipeline.evaluation import against_masks
from pipeline.evaluation.pictures import scene_pictures
from pipeline.model import SamModel, load_model
from pipeline.model.sam import THRESHOLDS
from pipeline.model.weights import DEMO

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


@pytest.mark.parametrize("name", ["coffee", "large"])
def test_they_find_a_sensible_number_of_masks(name: str, demo: SamModel) -> None:
    """With every default."""
    assert 10 <= len(MaskGenerator(demo).generate(PHOTOGRAPHS[name]())) <= 400


if "EVERYMASK_PHOTOS" in os.environ:

    @pytest.mark.parametrize("path", sorted(Path(os.environ["EVERYMASK_PHOTOS"]).iterdir()), ids=lambda p: p.name)
    def test_they_find_a_sensible_number_of_masks_in_a_folder(path: Path, demo: SamModel) -> None:
        rgb = np.array(Image.open(path).convert("RGB"))
        assert 10 <= len(MaskGenerator(demo).generate(rgb)) <= 400


def test_one_click_finds_a_part_of_a_synthetic_thing(demo: SamModel) -> None:
    """Scenes that it was not trained on; docs/model-card.md has the figures of many more."""
    config = AmgConfig(points_per_side=2)
    scores = against_masks.measure({"demo": demo}, scene_pictures(6), config, with_felzenszwalb=False)["demo"]
    best = np.concatenate([score.clicks.best_N for score in scores])
    assert len(best) > 30
    assert best.mean() > 0.5
