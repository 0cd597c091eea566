"""Where to click, and what a model answers to clicks."""

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.amg.resize import full_size_masks
from pipeline.config import AmgConfig
from pipeline.model.sam import Embedding, SamModel

# Of a prompt's masks: three of a model, three of another, and what comparing them takes.
_MASKS_A_PROMPT = 12
_POINTS_PER_BATCH = 64  # unless the settings say otherwise


@dataclass(frozen=True)
class Answers:
    """Three masks for each of N prompts."""

    masks_N3HW: NDArray[np.bool_]
    """At the picture's size."""
    predicted_iou_N3: NDArray[np.float64]
    """The method's own estimate of each mask's quality."""

    @property
    def chosen_NHW(self) -> NDArray[np.bool_]:
        """Of each prompt the mask that the method itself holds for the best."""
        chosen: NDArray[np.bool_] = self.masks_N3HW[
            np.arange(len(self.masks_N3HW)), self.predicted_iou_N3.argmax(axis=1)
        ]
        return chosen


def farthest_from_border(mask_HW: NDArray[np.bool_]) -> tuple[int, int]:
    """The pixel x, y of a mask that is farthest from all pixels outside; beyond the picture is outside.

    Euclidean distance, exact; of several the first, row by row. The point that RITM's evaluation clicks
    (Sofiiuk et al. 2021, https://arxiv.org/abs/2102.06583).

    Raises:
        ValueError: the mask is empty.
    """
    if not mask_HW.any():
        raise ValueError("an empty mask has no point")
    padded = np.pad(mask_HW.astype(np.uint8), 1)
    distance_HW = cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]
    y, x = divmod(int(distance_HW.argmax()), mask_HW.shape[1])
    return x, y


def second_points(
    masks_NHW: NDArray[np.bool_], first_N2: NDArray[np.float64], rng: np.random.Generator
) -> NDArray[np.float64]:
    """Of each mask a pixel x, y, all equally likely; for an empty mask its first point again."""
    points_N2 = first_N2.copy()
    for i, mask in enumerate(masks_NHW):
        inside = np.flatnonzero(mask)
        if len(inside):
            y, x = divmod(int(rng.choice(inside)), mask.shape[1])
            points_N2[i] = x, y
    return points_N2


def batches(count: int, picture_size: tuple[int, int], config: AmgConfig) -> Iterator[slice]:
    """Runs of prompts that may be answered at once: `points_per_batch`, fewer for `memory_budget`."""
    height, width = picture_size
    at_once = config.points_per_batch or _POINTS_PER_BATCH
    step = max(1, min(at_once, config.memory_budget // (_MASKS_A_PROMPT * height * width)))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def answer(model: SamModel, embedding: Embedding, points_NP2: NDArray[np.float64], config: AmgConfig) -> Answers:
    """What a model answers to N prompts of P foreground points.

    Args:
        model: The model.
        embedding: The picture, encoded by that model.
        points_NP2: x and y in pixels of the picture.
        config: Its `memory_budget` is kept while masks are resized.
    """
    iou_N3, logits_N3SS = decode(model, embedding, points_NP2)
    height, width = embedding.original_size
    chunks = full_size_masks(logits_N3SS.flatten(0, 1), embedding, model.image_size, config.memory_budget)
    masks_KWH = np.concatenate([masks.cpu().numpy() for masks in chunks])
    masks_KHW = np.ascontiguousarray(masks_KWH.transpose(0, 2, 1))
    return Answers(masks_KHW.reshape(-1, 3, height, width), iou_N3.cpu().double().numpy())


@torch.inference_mode()
def decode(
    model: SamModel, embedding: Embedding, points_NP2: NDArray[np.float64]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode prompts of one or more foreground points, as `segment_anything.SamPredictor.predict_torch`.

    With `multimask_output=True`, whatever the number of points. Single points go the model's own, faster way;
    for several points that has no entrance, and segment-anything's modules are called.

    Args:
        model: The model.
        embedding: The picture, encoded by that model.
        points_NP2: N prompts of P points x, y in pixels of the picture.

    Returns:
        Predicted IoU N x 3, and logits N x 3 x S/4 x S/4.
    """
    if points_NP2.shape[1] == 1:
        predictions = model.predict(model.prepare(embedding), points_NP2[:, 0])
        logits = model.upscale(predictions, torch.ones_like(predictions.iou_N3, dtype=torch.bool))
        return predictions.iou_N3, logits.reshape(-1, 3, *logits.shape[1:])
    original, resized = embedding.original_size, embedding.input_size
    scale = np.array([resized[1] / original[1], resized[0] / original[0]])
    # As in `SamModel.predict`: Metal has no float64.
    dtype = torch.float32 if model.device.type == "mps" else torch.float64
    points = torch.as_tensor(points_NP2 * scale, dtype=dtype, device=model.device)
    labels = torch.ones(points.shape[:2], dtype=torch.int, device=model.device)
    bf16 = torch.autocast(model.device.type, torch.bfloat16, enabled=model.precision == "bf16")
    with bf16, torch.backends.cudnn.flags(allow_tf32=False):
        sparse, dense = model.prompt_encoder(points=(points, labels), boxes=None, masks=None)
        logits, iou = model.mask_decoder(
            image_embeddings=embedding.features_1CHW,
            image_pe=model.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
        )
    return iou.float(), logits.float()
