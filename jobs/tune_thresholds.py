"""Give a checkpoint thresholds of its own, by which its masks are kept unless a run says otherwise."""

import logging
from pathlib import Path
from typing import Annotated, Literal

import torch
from cyclopts import Parameter

from jobs.command import run_command
from pipeline import storage
from pipeline.amg.selfcheck import checked_model, self_checking_checkpoint
from pipeline.config import AmgConfig, ModelConfig
from pipeline.evaluation.pictures import bsds_pictures
from pipeline.evaluation.thresholds import choose_thresholds
from pipeline.model.sam import THRESHOLDS
from pipeline.training.bsds import Split

_log = logging.getLogger("everymask")


def tune_thresholds(
    *,
    checkpoint: str,
    output: str,
    bsds: Path,
    split: Split = "train",
    limit: int | None = None,
    dtype: Literal["float32", "float16"] = "float32",
    amg: Annotated[AmgConfig, Parameter(name="*")] = AmgConfig(),  # noqa: B008 (frozen)
) -> int:
    """Choose thresholds on photographs that people divided into segments, and write them into a checkpoint.

    Exit codes: 0 done; 2 settings; 3 no such photographs or weights.

    Args:
        checkpoint: URI of the weights.
        output: Address of the .safetensors file that receives them with their thresholds.
        bsds: Folder of BSDS500.
        split: Which part of it; the one that is measured on later is not the one to tune on.
        limit: Photographs at most.
        dtype: That the weights are stored in.
        amg: How masks are found.
    """
    pictures = bsds_pictures(bsds, split, limit)
    model = checked_model(ModelConfig(checkpoint=checkpoint))
    choice = choose_thresholds(model, pictures, amg)
    model.thresholds = THRESHOLDS | choice.thresholds
    storage.write_atomic(output, self_checking_checkpoint(model.cpu(), getattr(torch, dtype)))
    _log.info(
        "wrote %s with %s: precision %.3f, recall %.3f on %d photographs",
        storage.redact(output),
        choice.thresholds,
        choice.precision,
        choice.recall,
        len(pictures),
    )
    return 0


if __name__ == "__main__":
    run_command(tune_thresholds, "jobs.tune_thresholds")
