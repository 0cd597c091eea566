"""A dataset of drawn masks, whose scores vary, made without a model and without Ray."""

from pathlib import Path
from typing import cast

from drawn_masks import IMAGE_SIZE, DrawnModel
from running import decode_here

from pipeline import reconcile
from pipeline import run as runs
from pipeline.amg import MaskGenerator
from pipeline.config import AmgConfig, LoadedWeights, MasksConfig
from pipeline.model.sam import THRESHOLDS, SamModel
from pipeline.predict import masks_content
from pipeline.run import Run
from pipeline.shard import make_shard
from pipeline.storage import canonical_uri


def drawn_dataset(images: Path, output: Path, *, images_per_shard: int = 8) -> Run:
    """A finished run over a folder, with its summary.json."""
    config = MasksConfig(
        images=canonical_uri(str(images)),
        output=canonical_uri(str(output)),
        images_per_shard=images_per_shard,
        amg=AmgConfig(points_per_side=4, pred_iou_thresh=0.85, stability_score_thresh=0.4, box_nms_thresh=0.9),
    )
    run = runs.open_run(config, LoadedWeights("of no file", IMAGE_SIZE, "drawn", THRESHOLDS))
    content = masks_content(MaskGenerator(cast(SamModel, DrawnModel()), **config.amg.model_dump()))
    made = {
        shard: make_shard(shard, config, content, decode_here(config), run.provenance)
        for shard in range(run.shards)
    }
    reconcile.write_summary(run, "complete", made, 1.0)
    return run
