"""The main job, as end-to-end tests start and watch it."""

import json
import subprocess
import time
from pathlib import Path
from typing import Any

from running import KEEP_ALL, TIMEOUT_S, make_dataset

from pipeline.config import AmgConfig, MasksConfig
from pipeline.storage import canonical_uri


def job(tiny_checkpoint: Path, images: str | Path, output: str | Path, *flags: str) -> list[str | Path]:
    """The job's name and flags."""
    return [
        "jobs.generate_masks",
        "--images",
        images,
        "--output",
        output,
        "--checkpoint",
        tiny_checkpoint,
        *KEEP_ALL,
        *flags,
    ]


def made_without_ray(tiny_checkpoint: Path, images: str | Path, output: str | Path, images_per_shard: int) -> None:
    """The dataset of `job`, made undisturbed, shard after shard in this process."""
    amg = AmgConfig(points_per_side=2, pred_iou_thresh=-10, stability_score_thresh=0, box_nms_thresh=1)
    make_dataset(
        MasksConfig(
            images=canonical_uri(str(images)),
            output=canonical_uri(str(output)),
            images_per_shard=images_per_shard,
            amg=amg,
        ),
        tiny_checkpoint,
    )


def summary_of(output: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((output / "summary.json").read_text())
    return document


def wait_for_shards(output: Path, count: int, process: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while len(list((output / "masks").glob("part-*.parquet"))) < count:
        assert process.poll() is None, "the job ended before it could be disturbed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
