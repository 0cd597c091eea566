"""Rows of the masks table made by hand, and finished runs of them, for curation and export."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from running import write_jpegs

from pipeline import documents, reconcile, rle
from pipeline import run as runs
from pipeline.config import LoadedWeights, MasksConfig
from pipeline.curation.arithmetic import box_of
from pipeline.curation.config import CurationConfig, StepsConfig
from pipeline.curation.curate import curate_shard
from pipeline.model.sam import THRESHOLDS
from pipeline.run import Run
from pipeline.shard import shard_uri, write_shard
from pipeline.storage import canonical_uri
from schemas.masks import MASKS_SCHEMA

Record = dict[str, Any]
WEIGHTS = LoadedWeights("0" * 64, 64, "mobile_sam", THRESHOLDS)
SIZE = (96, 128)
"""Of the pictures that `write_jpegs` writes."""
STEPS = StepsConfig(mask_iou_thresh=0.8, hierarchy_thresh=0.9, flatten="smallest")


def record(mask_HW: NDArray[np.bool_], iou: float = 0.9, **changes: Any) -> Record:
    """A mask as a row has it."""
    height, width = mask_HW.shape
    segmentation = rle.encode(mask_HW)
    made = {
        "segmentation": segmentation,
        "area": int(mask_HW.sum()),
        "bbox": box_of(segmentation),
        "predicted_iou": float(np.float32(iou)),
        "point_coords": [[1.5, 2.5]],
        "stability_score": float(np.float32(0.97)),
        "crop_box": [0, 0, width, height],
    }
    return made | changes


def pixels(masks: list[Record]) -> NDArray[np.bool_]:
    """N x H x W."""
    return np.array([rle.decode(mask["segmentation"]) for mask in masks])


def masks_run(
    folder: Path, masks_of_images: list[list[Record] | None], per_shard: int = 2, names: Sequence[str] = ()
) -> Run:
    """A finished run in `folder`/masks over pictures in `folder`/photos, None for one that cannot be read."""
    photos = write_jpegs(folder / "photos", len(masks_of_images))
    listed = sorted(path.name for path in photos.iterdir())
    for path, name in zip(listed, names, strict=False):
        (photos / path).rename(photos / name)
    names = names or listed
    config = MasksConfig(
        images=canonical_uri(str(photos)), output=canonical_uri(str(folder / "masks")), images_per_shard=per_shard
    )
    run = runs.open_run(config, WEIGHTS)
    rows = [
        {
            "image_id": number,
            "uri": f"{config.images}/{names[number]}",
            "status": "truncated" if masks is None else "ok" if masks else "empty",
            "error": "cut short" if masks is None else None,
            "height": None if masks is None else SIZE[0],
            "width": None if masks is None else SIZE[1],
            "masks": masks or [],
        }
        for number, masks in enumerate(masks_of_images)
    ]
    made = {
        shard: write_shard(
            shard_uri(config.output, "masks", shard),
            shard,
            rows[shard * per_shard : (shard + 1) * per_shard],
            MASKS_SCHEMA,
            run.provenance,
        )
        for shard in range(run.shards)
    }
    reconcile.write_summary(run, "complete", made, 1.0)
    return run


def curated(source: Run, steps: StepsConfig = STEPS, **changes: Any) -> Run[CurationConfig]:
    """A curated run beside its input, without its shards."""
    document = documents.read_finished_masks(source.config.output)
    output = canonical_uri(source.config.output.rpartition("/")[0] + "/curated")
    fields: dict[str, Any] = {"input": source.config.output, "output": output, "steps": steps}
    config = CurationConfig(**fields | changes)
    return runs.open_derived_run(config, config.input, document, config.determinants(document))


def make(run: Run[CurationConfig]) -> Path:
    made = {shard: curate_shard(shard, run.config, run.provenance) for shard in reconcile.shards_to_do(run)}
    reconcile.write_summary(run, "complete", made, 1.0)
    return Path(run.config.output.removeprefix("file://"))
