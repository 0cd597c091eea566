"""A finished mask."""

from dataclasses import dataclass
from typing import Any

from pipeline import rle
from pipeline.config import OutputMode
from pipeline.rle import Rle


@dataclass(frozen=True)
class Mask:
    """One mask of the whole image."""

    segmentation: Rle
    box_xyxy: list[int]
    predicted_iou: float
    point: list[float]
    """x, y of the prompt."""
    stability_score: float
    crop_box_xyxy: list[int]
    """The crop it was found in."""

    def record(self, output_mode: OutputMode) -> dict[str, Any]:
        """The reference's dict of this mask."""
        return {
            "segmentation": _segmentation(self.segmentation, output_mode),
            "area": rle.area(self.segmentation),
            "bbox": _xywh(self.box_xyxy),
            "predicted_iou": self.predicted_iou,
            "point_coords": [self.point],
            "stability_score": self.stability_score,
            "crop_box": _xywh(self.crop_box_xyxy),
        }


def _segmentation(segmentation: Rle, output_mode: OutputMode) -> Any:
    match output_mode:
        case "coco_rle":
            return segmentation
        case "uncompressed_rle":
            return rle.uncompressed(segmentation)
        case "binary_mask":
            return rle.decode(segmentation)


def _xywh(box_xyxy: list[int]) -> list[int]:
    left, top, right, bottom = box_xyxy
    return [left, top, right - left, bottom - top]
