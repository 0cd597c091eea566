"""The images of a trial, the run that nothing disturbs, and what is compared."""

import json
from pathlib import Path

import pyarrow.fs
from running import jpeg, make_dataset, rows
from s3server import S3Server

from pipeline.config import AmgConfig, MasksConfig, ModelConfig

_SIZE = (48, 64)


def put_images(server: S3Server, address: str, count: int) -> None:
    """Small pictures, no two alike."""
    for index in range(count):
        server.put(f"{address}/{index:04d}.jpg", jpeg(index, _SIZE))


def make_undisturbed(images: str, output: str, checkpoint: Path, images_per_shard: int) -> None:
    """The dataset of `runs_of_masks.job` with these images and weights, made in this process, without Ray."""
    config = MasksConfig(
        images=images,
        output=output,
        images_per_shard=images_per_shard,
        amg=AmgConfig(points_per_side=2, pred_iou_thresh=-10, stability_score_thresh=0, box_nms_thresh=1),
        model=ModelConfig(checkpoint=f"file://{checkpoint}", device="cpu"),
    )
    make_dataset(config, checkpoint)


def contents(server: S3Server, output: str) -> list[str]:
    """Every row with all its masks, as text, by image."""
    filesystem = pyarrow.fs.S3FileSystem(
        access_key=server.key,
        secret_key=server.secret,
        endpoint_override=server.endpoint,
        region="us-east-1",
    )
    return [json.dumps(row) for row in rows(output.removeprefix("s3://"), filesystem=filesystem)]
