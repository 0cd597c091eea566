"""One image's masks through the steps that are asked for, in their order; and one shard's images."""

import math
from typing import Any

from pipeline import rle
from pipeline.contents import Row
from pipeline.curation import duplicates, filters, hierarchy
from pipeline.curation.config import CurationConfig, StepsConfig
from pipeline.curation.filters import Record
from pipeline.curation.flatten import flattened
from pipeline.shard import ShardSummary, read_rows, shard_uri, write_shard
from schemas.curated import CURATED_SCHEMA
from schemas.masks import PROCESSED, Status


def curate_masks(masks: list[Record], size: tuple[int, int], steps: StepsConfig) -> list[Record]:
    """The masks that stay of an image's, with `parent_id` and `depth`.

    Args:
        masks: Of a row of the masks table; they are not changed.
        size: The image's height and width.
        steps: What to do.
    """
    masks = _chosen(masks, steps)
    masks = _filtered(masks, size, steps)
    masks = _distinct(masks, steps)
    if steps.hierarchy_thresh is None:
        masks = [mask | {"parent_id": None, "depth": None} for mask in masks]
    else:
        masks = hierarchy.with_parents(masks, steps.hierarchy_thresh)
    if steps.flatten is not None:
        masks = hierarchy.without_empty(flattened(masks, steps.flatten))
    return masks


def curate_row(row: Row, steps: StepsConfig) -> Row:
    """A row of the masks table, curated. That of an image that failed stays as it is."""
    if row["status"] not in PROCESSED:
        return row | {"coverage": None, "uncovered_area": None}
    masks = curate_masks(row["masks"], (row["height"], row["width"]), steps)
    pixels = row["height"] * row["width"]
    covered = rle.covered([mask["segmentation"] for mask in masks])
    return row | {
        "masks": masks,
        "status": Status.OK if masks else Status.EMPTY,
        "coverage": covered / pixels,
        "uncovered_area": pixels - covered,
    }


def curate_shard(shard: int, config: CurationConfig, provenance: dict[str, Any]) -> ShardSummary:
    """Make a shard of the output of the same shard of the input, whole or not at all.

    Args:
        shard: Its number.
        config: The run's settings.
        provenance: JSON for the footer: fingerprint, determinants of the rows.

    Raises:
        StorageError: the input's file cannot be read, or the output's not be written.
    """
    rows = (curate_row(row, config.steps) for row in read_rows(config.input, "masks", shard))
    return write_shard(shard_uri(config.output, config.kind, shard), shard, rows, CURATED_SCHEMA, provenance)


def _chosen(masks: list[Record], steps: StepsConfig) -> list[Record]:
    """What mask generation does with its candidates, in its order."""
    masks = filters.confident(masks, steps.pred_iou_thresh or 0)
    masks = filters.stable(masks, steps.stability_score_thresh or 0)
    overlaps = [iou for iou in (steps.box_nms_thresh, steps.crop_nms_thresh) if iou is not None]
    if steps.box_nms_thresh is not None:
        masks = duplicates.distinct_boxes(masks, steps.box_nms_thresh)
    if steps.crop_nms_thresh is not None:
        masks = duplicates.distinct_crops(masks, steps.crop_nms_thresh)
    if steps.min_mask_region_area > 0:
        masks = duplicates.without_small_regions(masks, steps.min_mask_region_area, max(overlaps, default=1.0))
    return masks


def _filtered(masks: list[Record], size: tuple[int, int], steps: StepsConfig) -> list[Record]:
    pixels = size[0] * size[1]
    masks = filters.of_area(masks, steps.min_area, math.inf if steps.max_area is None else steps.max_area)
    masks = filters.of_area(masks, steps.min_area_fraction * pixels, steps.max_area_fraction * pixels)
    if steps.max_aspect_ratio is not None:
        masks = filters.compact(masks, steps.max_aspect_ratio)
    masks = filters.off_the_border(masks, steps.max_border_sides)
    return filters.solid(masks, steps.max_hole_fraction)


def _distinct(masks: list[Record], steps: StepsConfig) -> list[Record]:
    limits = (steps.mask_iou_thresh, steps.containment_thresh)
    if limits == (None, None):
        return masks
    return duplicates.distinct_masks(masks, *(1.0 if limit is None else limit for limit in limits))
