"""Automatic mask generation: every mask of an image.

The masks are those of `segment_anything.SamAutomaticMaskGenerator`; the order of work is not. The predicted
IoU decides before a mask is made, duplicates are mostly dropped before they are measured, and all are before a
mask is encoded.
"""

from dataclasses import replace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from segment_anything.utils.amg import build_all_layer_point_grids, generate_crop_boxes

from pipeline.amg import filters
from pipeline.amg.bounds import bounds
from pipeline.amg.candidates import Found
from pipeline.amg.funnel import Funnel
from pipeline.amg.mask import Mask
from pipeline.amg.regions import without_small_regions
from pipeline.amg.resize import full_size_masks
from pipeline.amg.runs import encode_in_image
from pipeline.amg.selection import Crop, select
from pipeline.config import AmgConfig
from pipeline.memory import is_out_of_memory
from pipeline.model.sam import Embedding, PreparedImage, SamModel
from pipeline.phase_clock import PhaseClock

_MASKS_A_PROMPT: Final = 3


class MaskGenerator:
    """Finds all masks of an image by prompting a SAM model with a grid of points."""

    def __init__(self, model: SamModel, **arguments: Any) -> None:
        """Take a model and the arguments of `SamAutomaticMaskGenerator`.

        Args:
            model: From `pipeline.model.load_model`.
            **arguments: See `pipeline.config.AmgConfig` for names, meanings and defaults. They are the
                reference's, but for `output_mode`, which is "coco_rle" unless said otherwise, and for weights that
                carry thresholds of their own.

        Raises:
            pydantic.ValidationError: (a ValueError) an argument is unknown or out of range.
        """
        self.model = model
        self.config = config = AmgConfig(**arguments).with_thresholds(model.thresholds)
        if config.point_grids is not None:
            self._point_grids = [np.array(grid).reshape(-1, 2) for grid in config.point_grids]
        else:
            self._point_grids = build_all_layer_point_grids(
                config.points_per_side, config.crop_n_layers, config.crop_n_points_downscale_factor
            )

    def generate(self, rgb_HW3: NDArray[np.uint8], embedding: Embedding | None = None) -> list[dict[str, Any]]:
        """All masks of one image.

        Args:
            rgb_HW3: uint8, channels in the order red, green, blue.
            embedding: Of the whole image, where the model has encoded it before.

        Returns:
            A dict a mask: `segmentation` (COCO RLE, or as `output_mode` says), `area` in pixels, `bbox`
            x, y, width, height, `predicted_iou`, `point_coords` the prompt's [[x, y]], `stability_score`,
            `crop_box` x, y, width, height of the crop it was found in.

        Raises:
            ValueError: not an H x W x 3 array of uint8.
            RuntimeError, MemoryError: memory ran out, of prompts for a single one: `is_out_of_memory`.
        """
        return self.generate_with_funnel(rgb_HW3, embedding)[0]

    def generate_with_funnel(
        self, rgb_HW3: NDArray[np.uint8], embedding: Embedding | None = None, clock: PhaseClock | None = None
    ) -> tuple[list[dict[str, Any]], Funnel]:
        """What `generate` returns, and how many masks each filter dropped; the clock measures the phases."""
        if rgb_HW3.dtype != np.uint8 or rgb_HW3.ndim != 3 or rgb_HW3.shape[2] != 3:
            raise ValueError(f"an image is uint8 H x W x 3, not {rgb_HW3.dtype} {rgb_HW3.shape}")
        config = self.config
        clock = clock or PhaseClock(self.model.device)
        crop_boxes, layers = generate_crop_boxes(
            rgb_HW3.shape[:2], config.crop_n_layers, config.crop_overlap_ratio
        )
        crops = [
            self._of_crop(rgb_HW3, crop_box, self._point_grids[layer], embedding if layer == 0 else None, clock)
            for crop_box, layer in zip(crop_boxes, layers, strict=True)
            if crop_box[0] < crop_box[2] and crop_box[1] < crop_box[3]  # slivers have crops without pixels
        ]
        with clock.phase("post_process"):
            masks = [mask for masks_of_crop, _ in crops for mask in masks_of_crop]
            distinct_in_crops = len(masks)
            if len(crop_boxes) > 1 and masks:
                masks = _distinct_across_crops(masks, config.crop_nms_thresh)
            if config.min_mask_region_area > 0:
                box_iou = max(config.box_nms_thresh, config.crop_nms_thresh)
                masks = without_small_regions(masks, config.min_mask_region_area, box_iou)
            funnel = sum((of_crop for _, of_crop in crops), Funnel(duplicates=distinct_in_crops - len(masks)))
            return [mask.record(config.output_mode) for mask in masks], funnel

    def masks_of_crop(
        self,
        rgb_HW3: NDArray[np.uint8],
        crop_box_xyxy: list[int],
        grid_N2: NDArray[np.float64],
        embedding: Embedding | None = None,
    ) -> list[Mask]:
        """The distinct masks of one crop, in the image's frame, best predicted IoU first.

        Args:
            rgb_HW3: The whole image.
            crop_box_xyxy: The part to look at.
            grid_N2: Prompts x, y in 0..1 of the crop.
            embedding: Of the crop, where the model has encoded it before.
        """
        clock = PhaseClock(self.model.device)
        return self._of_crop(rgb_HW3, crop_box_xyxy, grid_N2, embedding, clock)[0]

    def _of_crop(
        self,
        rgb_HW3: NDArray[np.uint8],
        crop_box_xyxy: list[int],
        grid_N2: NDArray[np.float64],
        embedding: Embedding | None,
        clock: PhaseClock,
    ) -> tuple[list[Mask], Funnel]:
        """What `masks_of_crop` returns, and its funnel."""
        left, top, right, bottom = crop_box_xyxy
        with clock.phase("encode"):
            embedding = embedding or self.model.encode(rgb_HW3[top:bottom, left:right])
        points_N2 = grid_N2 * [right - left, bottom - top]
        with clock.phase("decode_masks"):
            image = self.model.prepare(embedding)
            found = self._found(image, points_N2)
        with clock.phase("post_process"):
            return self._masks_of(found, Crop(embedding, crop_box_xyxy, rgb_HW3.shape[:2]), points_N2)

    def _masks_of(
        self, found: list[Found], crop: Crop, points_N2: NDArray[np.float64]
    ) -> tuple[list[Mask], Funnel]:
        """The confident masks of a crop that stay, in the image's frame, and the crop's funnel."""
        left, top, _, _ = crop.box_xyxy
        candidates, dropped = select(found, crop, self.model.image_size, self.config)
        confident = sum(len(part.predicted_iou_N) for part in found)
        funnel = replace(dropped, candidates=_MASKS_A_PROMPT * len(points_N2), confident=confident)
        rles = [
            encoded
            for masks in full_size_masks(
                candidates.logits_NSS, crop.embedding, self.model.image_size, self.config.memory_budget
            )
            for encoded in encode_in_image(masks, crop.box_xyxy, crop.of_image)
        ]
        boxes = candidates.boxes_N4_xyxy.cpu() + torch.tensor([left, top, left, top])
        points = points_N2[candidates.prompts_N.cpu().numpy()] + [left, top]
        masks = [
            Mask(*fields, crop.box_xyxy)
            for fields in zip(
                rles,
                boxes.tolist(),
                candidates.predicted_iou_N.tolist(),
                points.tolist(),
                candidates.stability_score_N.tolist(),
                strict=True,
            )
        ]
        return masks, funnel

    def _found(self, image: PreparedImage, points_N2: NDArray[np.float64]) -> list[Found]:
        """The confident masks of all prompts, a batch in each; of half as many at a time once memory runs out."""
        at_once = self.config.points_per_batch or self.model.points_per_batch
        found: list[Found] = []
        start = 0
        while start < len(points_N2):
            stop = min(start + at_once, len(points_N2))
            try:
                found.append(self._found_at_once(image, points_N2, slice(start, stop)))
            except (RuntimeError, MemoryError) as error:
                if stop - start == 1 or not is_out_of_memory(error):
                    raise
                at_once = (stop - start) // 2
            else:
                start = stop
                continue
            torch.cuda.empty_cache()  # here, where the error no longer holds what was made
        return found

    def _found_at_once(self, image: PreparedImage, points_N2: NDArray[np.float64], prompts: slice) -> Found:
        predictions = self.model.predict(image, points_N2[prompts])
        iou_N3 = predictions.iou_N3
        threshold = self.config.pred_iou_thresh or 0
        confident_N3 = iou_N3 > (threshold if threshold > 0 else -torch.inf)
        logits = self.model.upscale(predictions, confident_N3)
        prompts_N = confident_N3.nonzero()[:, 0] + prompts.start
        boxes = bounds(logits, image.embedding, self.model.image_size)
        return Found(logits, iou_N3[confident_N3], prompts_N, boxes)


def _distinct_across_crops(masks: list[Mask], box_iou: float) -> list[Mask]:
    boxes = torch.tensor([mask.box_xyxy for mask in masks])
    frames = torch.tensor([mask.crop_box_xyxy for mask in masks])
    return [masks[i] for i in filters.nms_across_crops(boxes, frames, box_iou).tolist()]
