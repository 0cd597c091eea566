"""A training that takes seconds: few small scenes, few steps, a small masks dataset."""

from collections.abc import Iterator
from pathlib import Path

import torch
from running import make_dataset, write_jpegs

from pipeline.config import AmgConfig, MasksConfig, ModelConfig
from pipeline.model.weights import seeded_model
from pipeline.training.config import OptimizerConfig
from pipeline.training.coupled import Coupled
from pipeline.training.examples import Batch, Batches, scene_source
from pipeline.training.loop import Training

FEW = {"image_size": 64, "pictures": 2, "prompts": 3, "seed": 1}
ALONE = {"grouping": 0.5, "grouping_alone": 2}


def batches(first: int = 0, **changed: int) -> Iterator[Batch]:
    made = Batches(scene_source(64, 0), **FEW | changed)
    while True:
        yield made[first]
        first += 1


def training(config: OptimizerConfig, **arguments: float) -> Training:
    torch.manual_seed(3)
    model = seeded_model(3, 64)
    return Training(Coupled(model, **arguments), model, config)  # type: ignore[arg-type]


def steps(count: int, **changed: object) -> OptimizerConfig:
    return OptimizerConfig(
        **{"steps": count, "warmup_steps": 2, "learning_rate": 1e-3, "precision": "fp32"} | changed  # type: ignore[arg-type]
    )


def masks_dataset(folder: Path, checkpoint: Path, images: int, **changed: object) -> MasksConfig:
    """Images 96 x 128 with 12 masks each in `out`, the images in `images`."""
    config = MasksConfig(
        images=str(write_jpegs(folder / "images", images)),
        output=str(folder / "out"),
        **{  # type: ignore[arg-type]
            "images_per_shard": 2,
            "amg": AmgConfig(points_per_side=2, pred_iou_thresh=-10, stability_score_thresh=0, box_nms_thresh=1),
            "model": ModelConfig(checkpoint=str(checkpoint)),
            **changed,
        },
    )
    make_dataset(config, checkpoint)
    return config
