"""What would give wrong masks without an error is found before the first image."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from seeded import Rgb, lively_state_dict, model_with
from torch import nn

from pipeline.amg import MaskGenerator, selfcheck
from pipeline.amg.mask import Mask
from pipeline.amg.selfcheck import checked_model, known_picture, observe, self_check
from pipeline.config import ModelConfig
from pipeline.errors import CheckpointError, SelfCheckError
from pipeline.model import load_model
from pipeline.model.sam import Precision, SamModel
from pipeline.model.weights import checkpoint_bytes, load_tensors, seeded_model

SIZE: Final = 128


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint that carries what its own weights answer."""
    model = model_with(lively_state_dict(), SIZE)
    path = tmp_path_factory.mktemp("checkpoint") / "x.safetensors"
    path.write_bytes(checkpoint_bytes(model, {"image_size": SIZE, "expected": observe(model)}))
    return str(path)


@pytest.fixture
def model(checkpoint: str) -> SamModel:
    return load_model(checkpoint, device="cpu")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_checkpoint_with_its_expectation_passes(checkpoint: str, precision: Precision) -> None:
    checked = checked_model(ModelConfig(checkpoint=checkpoint, device="cpu", precision=precision))
    assert checked.expected is not None
    assert checked.image_size == SIZE


@pytest.mark.parametrize("seed", [0, 1])
def test_a_checkpoint_without_expectation_passes(seed: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(checkpoint_bytes(seeded_model(seed, 64), {"image_size": 64}))
    assert checked_model(ModelConfig(checkpoint=str(path), device="cpu")).expected is None


def test_a_checkpoint_at_another_size_than_its_own_passes_without_its_answers(checkpoint: str) -> None:
    checked = checked_model(ModelConfig(checkpoint=checkpoint, device="cpu", image_size=SIZE // 2))
    assert (checked.image_size, checked.expected) == (SIZE // 2, None)


def test_a_checkpoint_of_another_model_than_was_named_is_refused(checkpoint: str) -> None:
    with pytest.raises(CheckpointError, match="holds mobile_sam, not vit_b"):
        checked_model(ModelConfig(checkpoint=checkpoint, model="vit_b", device="cpu"))


def test_case_46_weights_that_were_never_loaded_are_refused() -> None:
    with pytest.raises(SelfCheckError, match="No weights were loaded"):
        self_check(seeded_model(1, 64))


def test_training_mode_is_refused(model: SamModel) -> None:
    with pytest.raises(SelfCheckError, match="in training mode, the first the model"):
        self_check(model.train())


def test_case_46_one_batch_normalisation_in_training_mode_is_refused(model: SamModel) -> None:
    name, norm = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d))
    norm.train()
    with pytest.raises(SelfCheckError, match=f"1 modules are in training mode, the first {name}"):
        self_check(model)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(value: float, model: SamModel) -> None:
    with torch.no_grad():
        model.image_encoder.get_parameter("neck.0.weight")[0, 0] = value
    with pytest.raises(SelfCheckError, match=r"not finite, the first image_encoder\.neck\.0\.weight"):
        self_check(model)


class BlueGreenRed(SamModel):
    """Takes the channels in the wrong order."""

    def preprocess(self, rgb_HW3: Rgb) -> tuple[torch.Tensor, tuple[int, int]]:
        return super().preprocess(np.ascontiguousarray(rgb_HW3[..., ::-1]))


class Unnormalised(SamModel):
    """Forgets mean and standard deviation."""

    def preprocess(self, rgb_HW3: Rgb) -> tuple[torch.Tensor, tuple[int, int]]:
        pixels, size = super().preprocess(rgb_HW3)
        return pixels * 57 + 114, size


@pytest.mark.parametrize("wrong", [BlueGreenRed, Unnormalised])
def test_case_46_wrong_colours_are_refused(wrong: type[SamModel], model: SamModel) -> None:
    model.__class__ = wrong
    model.expected = None  # found without knowing the answers
    with pytest.raises(SelfCheckError, match="Pure red"):
        self_check(model)


class PromptsInTheImagesFrame(MaskGenerator):
    """Scales a crop's grid to the whole image."""

    def masks_of_crop(self, rgb_HW3: Rgb, crop_box_xyxy: list[int], grid_N2: NDArray[np.float64]) -> list[Mask]:
        left, top, right, bottom = crop_box_xyxy
        height, width = rgb_HW3.shape[:2]
        wrong = (grid_N2 * [width, height] - [left, top]) / [right - left, bottom - top]
        return super().masks_of_crop(rgb_HW3, crop_box_xyxy, wrong)


class EncodesTheWholeImage(MaskGenerator):
    """Prompts a crop's grid in an embedding of something else."""

    def masks_of_crop(self, rgb_HW3: Rgb, crop_box_xyxy: list[int], grid_N2: NDArray[np.float64]) -> list[Mask]:
        return super().masks_of_crop(np.roll(rgb_HW3, 40, axis=1), crop_box_xyxy, grid_N2)


class MasksInTheCropsFrame(MaskGenerator):
    """Leaves masks, boxes and prompts where they are in the crop."""

    def masks_of_crop(self, rgb_HW3: Rgb, crop_box_xyxy: list[int], grid_N2: NDArray[np.float64]) -> list[Mask]:
        left, top, right, bottom = crop_box_xyxy
        crop = np.ascontiguousarray(rgb_HW3[top:bottom, left:right])
        return super().masks_of_crop(crop, [0, 0, right - left, bottom - top], grid_N2)


@pytest.mark.parametrize(
    "wrong",
    [PromptsInTheImagesFrame, EncodesTheWholeImage, MasksInTheCropsFrame],
    ids=lambda wrong: wrong.__name__,
)
def test_case_46_crops_in_the_wrong_frame_are_refused(
    wrong: type[MaskGenerator], model: SamModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.expected = None
    self_check(model)
    monkeypatch.setattr(selfcheck, "MaskGenerator", wrong)
    with pytest.raises(SelfCheckError, match="wrong frame"):
        self_check(model)


def perturb(module: str) -> Callable[[SamModel], None]:
    def change(model: SamModel) -> None:
        with torch.no_grad():
            model.get_parameter(module).mul_(1.2)

    return change


def other_weights(model: SamModel) -> None:
    load_tensors(model, lively_state_dict(1), "x")


@pytest.mark.parametrize(
    "change",
    [
        perturb("image_encoder.stages.0.blocks.0.conv1.conv.weight"),
        perturb("image_encoder.neck.3.weight"),
        perturb("mask_decoder.iou_prediction_head.layers.0.weight"),
        perturb("mask_decoder.transformer.layers.0.self_attn.v_proj.weight"),
        other_weights,
    ],
)
def test_weights_that_answer_otherwise_than_expected_are_refused(
    change: Callable[[SamModel], None], model: SamModel
) -> None:
    change(model)
    with pytest.raises(SelfCheckError, match=r"known picture the model's (embedding|predicted_iou) differs"):
        self_check(model)


def test_an_encoder_that_computes_otherwise_is_refused(model: SamModel) -> None:
    """The same weights in another structure: a norm left out."""
    model.image_encoder.neck[1] = nn.Identity().eval()  # type: ignore[index, operator]
    with pytest.raises(SelfCheckError, match="differs"):
        self_check(model)


def test_answers_that_are_not_finite_are_refused(model: SamModel) -> None:
    """Finite weights, but an arithmetic that overflows."""
    with torch.no_grad():
        for parameter in model.mask_decoder.iou_prediction_head.parameters():
            parameter.mul_(1e30)
    with pytest.raises(SelfCheckError):
        self_check(model)
    model.expected = None
    with pytest.raises(SelfCheckError):
        self_check(model)


def test_the_known_picture_is_unlike_itself_in_any_other_channel_order() -> None:
    picture = known_picture()
    assert picture.shape == (96, 128, 3)
    for order in ([0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]):
        assert np.abs(np.subtract(picture[..., order], picture, dtype=np.int64)).mean() > 5


def test_observation_is_json_and_repeatable(model: SamModel, checkpoint: str) -> None:
    first: dict[str, Any] = observe(model)
    assert first == observe(model)
    assert observe(load_model(checkpoint, "cpu", kernels=False)) == model.expected  # made with that decoder
    assert np.ptp(first["embedding"]) > 0.1
    assert np.ptp(first["predicted_iou"]) > 0
