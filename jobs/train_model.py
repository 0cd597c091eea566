"""SAM's promptable training: a MobileSAM from pictures with masks."""

import logging
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Final

import torch
from cyclopts import Parameter

from jobs.command import run_command
from pipeline import storage
from pipeline.errors import SettingsError
from pipeline.model import load_model, pick_device
from pipeline.model.sam import SamModel
from pipeline.model.weights import seeded_model
from pipeline.training import bsds
from pipeline.training.config import Stage, TrainConfig
from pipeline.training.coupled import Coupled
from pipeline.training.examples import Batches, Source, bsds_source, mixed, scene_source
from pipeline.training.export import export
from pipeline.training.loop import Checkpoints, Training
from pipeline.training.masks import MasksSource

_PLACES: Final = {"output", "masks", "checkpoint"}
_HOW: Final = {"device", "loaders", "checkpoint_minutes", "overwrite"}
"""Settings that may change between two starts; what is in a place, its identity says."""
_SCENE_SIZE: Final = 256
_log = logging.getLogger("everymask")


def train_model(*, config: Annotated[TrainConfig, Parameter(name="*")]) -> int:
    """Train encoder and decoder together, as SAM was: clicks in, masks out.

    Killed and started again, it goes on at the step of its last checkpoint. Exit codes: 0 done; 2 settings; 3 no
    such data, weights or device; 5 the loss is no number; 130 interrupted.
    """
    device = pick_device(config.device)
    masks = None if config.masks is None else MasksSource(config.masks)
    source_of = sources(config, masks)
    stages = config.parts
    model = _model(config, stages[0].image_size).to(memory_format=torch.channels_last).to(device)
    training = Training(
        _objective(config, model),
        model,
        config.optimizer,
    )
    address = f"{config.output}.training"
    if config.overwrite:
        storage.delete(address)
    checkpoints = Checkpoints(address, config.checkpoint_minutes, _settings(config, model, masks))
    if checkpoints.resume(training):
        _log.info("going on: %s", training.in_words())
    for stage in stages:
        if training.progress < stage.until:
            model.set_image_size(stage.image_size)
            batches = _batches(source_of(stage), stage, config, training.position.step)
            training.run(batches, stage.until, checkpoints)
            checkpoints.write(training)
    storage.write_atomic(config.output, export(training, stages[-1].image_size))
    _log.info("wrote %s after %s", storage.redact(config.output), training.in_words())
    return 0


def _settings(config: TrainConfig, model: SamModel, masks: MasksSource | None) -> dict[str, Any]:
    """What a checkpoint must agree in to be gone on from: all that decides the weights."""
    settings = config.model_dump(mode="json", exclude=_PLACES | _HOW)
    settings["checkpoint's SHA-256"] = model.weights_sha256 or None
    identity = {} if masks is None else masks.identity
    return settings | {f"masks' {name}": value for name, value in identity.items()}


def _objective(config: TrainConfig, model: SamModel) -> Coupled:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        objective = Coupled(
            model,
            box_share=config.box_share,
            corrective_clicks=config.corrective_clicks,
            grouping=config.grouping,
            grouping_alone=config.grouping_steps,
            seed=config.seed,
        )
    return objective.to(model.device)


def _model(config: TrainConfig, image_size: int) -> SamModel:
    if config.checkpoint is not None:
        return load_model(config.checkpoint, "cpu", image_size=image_size)
    return seeded_model(config.seed, image_size)


def sources(config: TrainConfig, masks: MasksSource | None) -> Callable[[Stage], Source]:
    """The source of a stage's examples. Only the scenes are another's in another stage.

    Raises:
        SettingsError: there is none.
        TrainingDataError: it cannot be read.
    """
    others: list[Source] = [] if masks is None else [masks]
    surfaces: list[Any] = []
    if config.bsds is not None:
        photographs = [bsds.read_photograph(path) for path in bsds.photographs(config.bsds, "train")]
        surfaces = [photograph.rgb_HW3 for photograph in photographs]
        others.append(bsds_source(photographs))
    if not others and not config.scenes:
        raise SettingsError("There is nothing to train on: give --bsds, --masks or --scenes.")
    natural = config.parts[-1].image_size

    def source_of(stage: Stage) -> Source:
        if not config.scenes:
            return mixed(others, [1.0] * len(others))
        # As large as the pieces that are cut from it, and drawn at the size at which masks will be made.
        size = min(natural, max(_SCENE_SIZE, stage.image_size))
        scenes = scene_source(size, config.seed, surfaces, size / natural)
        return mixed([*others, scenes], [1.0] * len(others) + [config.scenes])

    return source_of


def _batches(source: Source, stage: Stage, config: TrainConfig, first: int) -> Iterator[Any]:
    batches = Batches(
        source,
        image_size=stage.image_size,
        pictures=stage.pictures,
        prompts=config.prompts,
        seed=config.seed,
        natural_size=config.parts[-1].image_size,
    )
    return iter(
        torch.utils.data.DataLoader(
            batches,
            batch_size=None,
            sampler=range(first, 2**62),
            num_workers=config.loaders,
            prefetch_factor=4 if config.loaders else None,
        )
    )


if __name__ == "__main__":
    run_command(train_model, "jobs.train_model")
