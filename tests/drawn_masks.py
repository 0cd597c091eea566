"""Masks drawn by hand in place of a model, for our generator and for the reference's."""

from types import SimpleNamespace
from typing import Any, Final, cast

import numpy as np
import torch
from numpy.typing import NDArray
from seeded import ReferenceGenerator, Rgb, Sam
from segment_anything.utils.transforms import ResizeLongestSide

from pipeline.amg import MaskGenerator
from pipeline.model.image_tokens import ImageTables
from pipeline.model.sam import THRESHOLDS, Embedding, Predictions, PreparedImage, SamModel

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
    points_per_batch = 64
    images_per_batch = 1
    device = torch.device("cpu")
    precision = "fp32"
    thresholds = THRESHOLDS

    def encode(self, rgb_HW3: Rgb) -> Embedding:
        size = ResizeLongestSide.get_preprocess_shape(*rgb_HW3.shape[:2], IMAGE_SIZE)
        return Embedding(torch.tensor([[[corner(rgb_HW3)]]]), rgb_HW3.shape[:2], size)

    def prepare(self, embedding: Embedding) -> PreparedImage:
        return PreparedImage(embedding, cast(ImageTables, None))

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
