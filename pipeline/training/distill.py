"""One distillation from its settings to its weights, in one process or as one of several."""

import logging
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipeline import documents, storage
from pipeline.model.sam import SamModel
from pipeline.training.config import DistillConfig, OptimizerConfig
from pipeline.training.decoupled import Distillation, student
from pipeline.training.export import export
from pipeline.training.lessons import LessonReader, Order, ShardsOfEpoch
from pipeline.training.loop import Checkpoints, Training
from pipeline.training.store import open_store

_PLACES: Final = {"store", "output", "decoder"}
_HOW: Final = {"device", "num_workers", "read_ahead", "checkpoint_minutes", "overwrite"}
"""Settings that may change between two starts; which store it is, its identity says."""
_log = logging.getLogger("everymask")


@dataclass(frozen=True)
class Plan:
    """All that is known before the first step. It can be sent to workers."""

    config: DistillConfig
    order: Order
    model: SamModel
    """The untrained student under its teacher's decoder, on the CPU."""

    @property
    def steps(self) -> int:
        """Updates of the weights in all."""
        return self.config.steps or max(1, round(self.config.epochs * self.order.steps_per_epoch))

    @property
    def checkpoint_uri(self) -> str:
        """Where the training's state is kept."""
        return f"{self.config.output}.training"

    @property
    def settings(self) -> dict[str, Any]:
        """What a checkpoint must agree in to be gone on from: all that decides the weights."""
        settings = self.config.model_dump(mode="json", exclude=_PLACES | _HOW)
        identity = self.order.store.identity
        return settings | {"steps": self.steps} | {f"store's {name}": value for name, value in identity.items()}


def plan(config: DistillConfig) -> Plan:
    """Look at everything that a distillation needs. With `overwrite` an older checkpoint is deleted.

    Raises:
        CheckpointError: the teacher's weights, or ImageNet's, are not what they must be.
        SettingsError: more workers than shards.
        StorageError: an address cannot be read.
        TrainingDataError: the store is not finished or no teacher store.
    """
    config = config.model_copy(
        update={"store": storage.canonical_uri(config.store), "output": storage.canonical_uri(config.output)}
    )
    store = open_store(config.store)
    order = Order.of(
        store,
        batch_size=config.batch_size,
        workers=config.num_workers or 1,
        shards_mixed=config.shards_mixed,
        seed=config.seed,
    )
    model = student(
        config.student,
        store.image_size,
        config.seed,
        config.decoder or _teacher(config.store),
        store.weights_sha256,
        imagenet=config.imagenet,
    )
    made = Plan(config, order, model)
    if config.overwrite:
        storage.delete(made.checkpoint_uri)
    return made


def train(
    plan: Plan,
    device: torch.device,
    *,
    rank: int = 0,
    shards: ShardsOfEpoch | None = None,
    on_step: Callable[[Training], None] = lambda _training: None,
) -> Training:
    """Train, from the checkpoint if there is one, and write the student's weights.

    Where there are several workers, `torch.distributed` has joined them, and the one of rank 0 writes.

    Args:
        plan: The same for all workers. Its model is the one that is trained.
        device: This worker's.
        rank: This worker's.
        shards: As `LessonReader` takes them.
        on_step: Called after each step, when its checkpoint is written.

    Raises:
        Diverged: a loss is no number.
        StorageError, TrainingDataError: the store or the pictures cannot be read, or the checkpoint is of another
            training.
    """
    config, order = plan.config, plan.order
    model = plan.model.to(device)
    objective: nn.Module = Distillation(model, with_padding=config.with_padding)
    if order.workers > 1:
        objective = DistributedDataParallel(objective)
    training = Training(objective, model, OptimizerConfig(steps=plan.steps, **config.descent.model_dump()))
    checkpoints = Checkpoints(plan.checkpoint_uri, config.checkpoint_minutes, plan.settings)
    if checkpoints.resume(training):
        _log.info("going on: %s", training.in_words())

    def after(training: Training) -> None:
        if rank == 0:
            checkpoints(training)
        on_step(training)

    reader = LessonReader(order, rank, read_ahead=config.read_ahead, shards=shards)
    with closing(reader.batches(training.position.step)) as batches:
        training.run(batches, 1.0, after)
    if reader.skipped.images:
        _log.warning("worker %d left out %d images that could not be read", rank, reader.skipped.images)
    if rank == 0:
        checkpoints.write(training)
        storage.write_atomic(config.output, export(training, order.store.image_size))
        _log.info("wrote %s after %s", storage.redact(config.output), training.in_words())
    return training


def _teacher(store: str) -> str:
    """Where the teacher's weights were when the store was made."""
    model = documents.read_document(store)["settings"]["model"]
    address: str = model["checkpoint"] or model["model"] or "mobile_sam"
    return address
