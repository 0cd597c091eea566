"""Before a worker takes its first image: does the model see what it should?

Weights that were never loaded, batch normalisation left in training mode, colours in the wrong order or
crops prompted in the wrong frame give masks without any error. This finds them, on one small known picture.
"""

from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.amg.generator import MaskGenerator
from pipeline.amg.mask import Mask
from pipeline.config import ModelConfig
from pipeline.errors import CheckpointError, SelfCheckError
from pipeline.model import load_model
from pipeline.model.sam import PIXEL_MEAN, PIXEL_STD, SamModel
from pipeline.model.weights import checkpoint_bytes

_CROP: Final = [8, 6, 120, 88]
# Several, because masks that reach the crop's edges may be dropped.
_GRID: Final = np.array([[0.3, 0.4], [0.75, 0.75], [0.55, 0.2], [0.1, 0.9]])
_TOLERANCE: Final = {"fp32": 2e-3, "bf16": 0.15}


def checked_model(config: ModelConfig, *, kernels: bool = True) -> SamModel:
    """Load the model that the settings name, and check it; `kernels` as for `load_model`.

    Raises:
        CheckpointError, SettingsError, StorageError: as `load_model`.
        SelfCheckError: as `self_check`.
    """
    model = load_model(config.address, config.device, config.precision, config.image_size, kernels=kernels)
    wanted = "mobile_sam" if config.model == "demo" else config.model
    if wanted not in {None, model.architecture}:
        raise CheckpointError(f"{config.address} holds {model.architecture}, not {config.model}.")
    self_check(model)
    return model


def self_check(model: SamModel) -> None:
    """Check a model that was just loaded.

    Always: eval mode, weights loaded and finite, colours normalised in the order red, green, blue, crops
    prompted in their own frame. Where the checkpoint holds the answers of its own weights: those too.

    Raises:
        SelfCheckError: names what is wrong.
    """
    _check_structure(model)
    _check_colours(model)
    observed = observe(model)
    if model.expected is None:
        return
    tolerance = _TOLERANCE[model.precision]
    for what, values in model.expected.items():
        if len(values) != len(observed[what]):
            raise SelfCheckError(f"The checkpoint's answers on the known picture are not {what}s of this version.")
        difference = float(np.abs(np.subtract(observed[what], values)).max())
        if not difference <= tolerance:
            raise SelfCheckError(
                f"On the known picture the model's {what} differs by {difference:.3g} from what the checkpoint "
                f"says of its own weights (tolerance {tolerance}): the weights, the preprocessing or this "
                "machine's arithmetic are not those that made them."
            )


def observe(model: SamModel) -> dict[str, Any]:
    """What a model makes of the known picture; a checkpoint may carry it as what is expected.

    Raises:
        SelfCheckError: a crop's prompts or masks are in the wrong frame, or values are not finite.
    """
    picture = known_picture()
    left, top, right, bottom = _CROP
    embedding = model.encode(picture[top:bottom, left:right])
    corner = np.array([left, top])
    points = _GRID * [right - left, bottom - top]
    iou_N3 = model.predict(model.prepare(embedding), points).iou_N3
    if not (embedding.features_1CHW.isfinite().all() and iou_N3.isfinite().all()):
        raise SelfCheckError("What the model makes of the known picture is not finite.")
    generator = MaskGenerator(model, pred_iou_thresh=0, stability_score_thresh=0, box_nms_thresh=1.0)
    masks = generator.masks_of_crop(picture, _CROP, _GRID)
    _check_frame(masks, iou_N3, corner + points)
    step = embedding.features_1CHW.shape[-1] // 4
    samples = embedding.features_1CHW[0, ::32, ::step, ::step].flatten()
    return {"embedding": samples.tolist(), "predicted_iou": iou_N3.flatten().tolist()}


def self_checking_checkpoint(model: SamModel, dtype: torch.dtype = torch.float32) -> bytes:
    """A model as a checkpoint that carries its image size, its thresholds and its answers for `self_check`.

    Args:
        model: In eval mode; its floating point weights are rounded to `dtype`.
        dtype: That they are stored in.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data.copy_(tensor.data.to(dtype))
    model.to(model.device)  # timm's attention forgets the biases it gathered
    metadata = {"image_size": model.image_size, "thresholds": dict(model.thresholds), "expected": observe(model)}
    return checkpoint_bytes(model, metadata, dtype)


def known_picture() -> NDArray[np.uint8]:
    """A red disc and a blue rectangle on a green ramp, 96 x 128: unlike itself in any other channel order."""
    y, x = np.mgrid[:96, :128]
    picture = np.stack([20 + 0 * x, 40 + x, 60 + y // 2], axis=2)
    picture[(x - 42) ** 2 + (y - 40) ** 2 < 24**2] = (220, 40, 30)
    picture[50:84, 76:112] = (30, 60, 230)
    return picture.astype(np.uint8)


def _check_structure(model: SamModel) -> None:
    if not model.weights_sha256:
        raise SelfCheckError("No weights were loaded into the model.")
    training = [name or "the model" for name, module in model.named_modules() if module.training]
    if training:
        raise SelfCheckError(f"{len(training)} modules are in training mode, the first {training[0]}.")
    broken = [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]
    if broken:
        raise SelfCheckError(f"{len(broken)} weights are not finite, the first {broken[0]}.")


def _check_colours(model: SamModel) -> None:
    red = np.zeros((2, 2, 3), dtype=np.uint8)
    red[..., 0] = 255
    seen = model.preprocess(red)[0][0, :, 0, 0].cpu()
    right = (torch.tensor([255.0, 0.0, 0.0]) - torch.tensor(PIXEL_MEAN)) / torch.tensor(PIXEL_STD)
    if not torch.allclose(seen, right, atol=1e-5):
        raise SelfCheckError(
            f"Pure red reaches the encoder as {seen.tolist()}, not {right.tolist()}: colours are not in the "
            "order red, green, blue, or normalised otherwise."
        )


def _check_frame(masks: list[Mask], iou_N3: torch.Tensor, points_N2: NDArray[np.float64]) -> None:
    """Each mask of the crop answers one of its prompts, there. A mask that the crop cuts is not among them."""
    left, top, right, bottom = _CROP
    for mask in masks:
        prompt = np.abs(points_N2 - mask.point).max(axis=1).argmin()
        answers = iou_N3[prompt].tolist()
        if not np.isclose(answers, mask.predicted_iou, atol=1e-4).any():
            raise SelfCheckError(
                f"A prompt in a crop gives the predicted IoU {mask.predicted_iou}, the same prompt in the crop "
                f"alone {answers}: crops are prompted in the wrong frame."
            )
        x0, y0, x1, y1 = mask.box_xyxy
        empty = mask.box_xyxy == [left, top, left, top]
        inside = empty or (left <= x0 <= x1 < right and top <= y0 <= y1 < bottom)
        if not inside or not np.allclose(mask.point, points_N2[prompt]):
            raise SelfCheckError(
                f"A mask of the crop {_CROP} has the box {mask.box_xyxy} and the prompt {mask.point}, where "
                f"{points_N2.tolist()} were prompted: masks of crops are in the wrong frame."
            )
