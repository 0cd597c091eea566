"""What the phases of an image take, as told with each image."""

import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from running import decode_here, write_jpegs

from pipeline import manifest, sources
from pipeline.config import AmgConfig, EmbeddingsConfig, ImagesConfig, MasksConfig, RunConfig
from pipeline.model import SamModel, load_model
from pipeline.phase_clock import PhaseClock
from pipeline.predict import content_of
from pipeline.shard import ImageDone, make_shard
from pipeline.storage import canonical_uri

ALL_MASKS = AmgConfig(points_per_side=2, pred_iou_thresh=-10, stability_score_thresh=0, box_nms_thresh=1)


class Slow:
    """A model whose encoder takes a fifth of a second longer."""

    def __init__(self, model: SamModel) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def encode(self, rgb_HW3: Any) -> Any:
        time.sleep(0.2)
        return self._model.encode(rgb_HW3)


def told(config: RunConfig, model: Any, decode: Any = None) -> list[ImageDone]:
    """What is told of the images of the only shard."""
    manifest.write_manifest(sources.find_images(config.images, Counter()), config.output, images_per_shard=99)
    found: list[ImageDone] = []
    content = content_of(config, model)
    make_shard(0, config, content, decode or decode_here(config), {}, on_image=found.append)
    return found


def addresses(tmp_path: Path, images: int) -> dict[str, str]:
    folder = write_jpegs(tmp_path / "in", images)
    return {"images": canonical_uri(str(folder)), "output": canonical_uri(str(tmp_path / "out"))}


def test_phases_are_measured_apart(tmp_path: Path, tiny_checkpoint: Path) -> None:
    config = MasksConfig(**addresses(tmp_path, 3), amg=ALL_MASKS)
    quick = decode_here(config)

    def slowly_decoded(data: bytes) -> Any:
        time.sleep(0.3)
        return quick(data)

    for image in told(config, Slow(load_model(str(tiny_checkpoint))), slowly_decoded):
        assert set(image.seconds) == {"fetch", "decode", "encode", "decode_masks", "post_process"}
        assert 0.3 <= image.seconds["decode"] < 3
        assert 0.2 <= image.seconds["encode"] < 3
        assert 0 < image.seconds["decode_masks"] != image.seconds["post_process"] > 0
        assert image.seconds["fetch"] > 0


def test_crops_add_up_and_all_time_is_in_a_phase(tmp_path: Path, tiny_checkpoint: Path) -> None:
    amg = ALL_MASKS.model_copy(update={"crop_n_layers": 1, "crop_n_points_downscale_factor": 2})
    config = MasksConfig(**addresses(tmp_path, 1), amg=amg)
    [image] = told(config, Slow(load_model(str(tiny_checkpoint))))
    assert image.seconds["encode"] >= 5 * 0.2


def test_an_embedding_is_encoding_alone(tmp_path: Path, tiny_checkpoint: Path) -> None:
    config = EmbeddingsConfig(**addresses(tmp_path, 1))
    [image] = told(config, Slow(load_model(str(tiny_checkpoint))))
    assert set(image.seconds) == {"fetch", "decode", "encode"}
    assert image.seconds["encode"] >= 0.2


def test_of_an_image_that_fails_the_phases_it_came_to_are_told(tmp_path: Path, tiny_checkpoint: Path) -> None:
    config = MasksConfig(**addresses(tmp_path, 1), amg=ALL_MASKS)
    (tmp_path / "in" / "broken.jpg").write_bytes(b"x")
    _, broken = told(config, load_model(str(tiny_checkpoint)))
    assert (broken.status, set(broken.seconds)) == ("not_an_image", {"fetch", "decode"})
    assert broken.reading is not None
    assert broken.reading.bytes == 1


def test_queues_are_full_where_the_device_is_slow(tmp_path: Path, tiny_checkpoint: Path) -> None:
    config = MasksConfig(**addresses(tmp_path, 10), amg=ALL_MASKS, reading=ImagesConfig(read_ahead=4))
    images = told(config, Slow(load_model(str(tiny_checkpoint))))
    readings = [image.reading for image in images if image.reading is not None]
    assert len(readings) == 10
    middle, last = readings[2], readings[-1]
    assert (last.in_flight, last.fetched, last.decoded) == (0, 0, 0)
    assert middle.decoded == 2
    assert 4 <= middle.in_flight <= 6
    assert middle.fetched >= 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_phase_is_what_the_gpu_does_in_it() -> None:
    clock = PhaseClock(torch.device("cuda"))
    numbers = torch.randn(8192, 8192, device="cuda")
    torch.cuda.synchronize()
    start = time.perf_counter()
    with clock.phase("encode"):
        for _ in range(20):
            numbers = torch.nn.functional.normalize(numbers @ numbers)
    launched = time.perf_counter() - start
    with clock.phase("post_process"):
        numbers[0].cpu()
    whole = time.perf_counter() - start
    seconds = clock.seconds()
    assert launched < whole / 2
    assert seconds["encode"] > 0.8 * whole
    assert sum(seconds.values()) == pytest.approx(whole, rel=0.1)
    assert np.isfinite(list(seconds.values())).all()
