"""Decoupled distillation: a MobileSAM from a teacher's stored embeddings."""

import logging
from typing import Annotated

import torch
from cyclopts import Parameter

from jobs.command import run_command
from pipeline import storage
from pipeline.cluster import cluster_address
from pipeline.errors import SettingsError
from pipeline.model import pick_device
from pipeline.training.config import DistillConfig
from pipeline.training.distill import plan, train

_log = logging.getLogger("everymask")


def distill(*, config: Annotated[DistillConfig, Parameter(name="*")]) -> int:
    """Train a small image encoder on the embeddings of a large one, which `jobs.embed_images` has stored.

    MobileSAM's decoupled distillation, https://arxiv.org/abs/2306.14289. The result is a whole SAM: the student
    under its teacher's prompt encoder and mask decoder. Without --num-workers it trains in this process and needs
    no Ray; with it, Ray Train starts so many workers on the cluster of $RAY_ADDRESS, or on this machine.

    Killed and started again, it goes on at the step of its last checkpoint. Exit codes: 0 done; 1 workers were
    lost again and again; 2 settings or device; 3 no such store, pictures or weights; 5 the loss is no number; 130
    interrupted.
    """
    on_cluster = config.num_workers is not None and cluster_address() is not None
    if not on_cluster:
        device = pick_device(config.device)
        if device.type == "cuda" and (config.num_workers or 1) > (gpus := torch.cuda.device_count()):
            raise SettingsError(
                f"{config.num_workers} workers need as many GPUs, and there are {gpus} here; use a smaller "
                "--num-workers, or a cluster's RAY_ADDRESS."
            )
    made = plan(config)
    _log.info(
        "%d images in %d shards; %d steps of %d; writing to %s",
        made.order.store.images,
        made.order.store.shards,
        made.steps,
        config.batch_size,
        storage.redact(config.output),
    )
    if config.num_workers is None:
        train(made, device)
    else:
        from pipeline.training_engine import train_on_ray  # noqa: PLC0415 (the other way does without Ray)

        train_on_ray(made)
    return 0


if __name__ == "__main__":
    run_command(distill, "jobs.distill")
