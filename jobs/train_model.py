"""SAM's promptable training: a MobileSAM from pictures with masks."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final, Self

import torch
from cyclopts import Parameter
from pydantic import BaseModel, ConfigDict, Field, model_validator

from jobs.command import run_command
from pipeline import storage
from pipeline.errors import SettingsError
from pipeline.model import load_model, pick_device
from pipeline.model.sam import SamModel
from pipeline.model.weights import seeded_model
from pipeline.training import bsds
from pipeline.training.config import OptimizerConfig
from pipeline.training.coupled import Coupled
from pipeline.training.examples import Batches, Source, bsds_source, mixed, scene_source
from pipeline.training.export import export
from pipeline.training.loop import Checkpoints, Training
from pipeline.training.masks import masks_source

_log = logging.getLogger("everymask")
_FLAT: Final = Parameter(name="*")
_SCENE_SIZE: Final = 256


class Stage(BaseModel):
    """A part of a training at one size of input."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image_size: int
    pictures: int
    """A batch."""
    until: float
    """Progress at which it ends."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """From SIZE:PICTURES:UNTIL."""
        size, pictures, until = text.split(":")
        return cls(image_size=int(size), pictures=int(pictures), until=float(until))


class TrainConfig(BaseModel):
    """One training of `jobs.train_model`."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    output: str
    """Address of the .safetensors file to write; its checkpoint stands beside it, with `.training` added."""
    masks: str | None = None
    """A masks dataset to learn from: what jobs.generate_masks was given as --output."""
    bsds: Path | None = None
    """Folder of BSDS500, whose train split is used."""
    scenes: Annotated[float, Field(ge=0)] = 0.0
    """Share of synthetic scenes among the examples, where each other source has 1."""
    checkpoint: str | None = None
    """URI of weights to begin from; by default random ones."""
    stages: tuple[str, ...] = ("256:32:0.8", "512:16:1")
    """SIZE:PICTURES:UNTIL each: side of the input, pictures a batch, share of the training at which it ends."""
    prompts: Annotated[int, Field(ge=1)] = 8
    """A picture."""
    box_share: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    """Of the batches that are prompted with boxes."""
    corrective_clicks: Annotated[int, Field(ge=0)] = 0
    """Rounds of one more click where the mask is wrong."""
    grouping: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the auxiliary objective that asks features which pixels belong together; 0 leaves it out."""
    grouping_steps: Annotated[int, Field(ge=0)] = 0
    """Steps at the beginning in which that is the only objective."""
    seed: int = 0
    """Of the weights and of all that is drawn."""
    device: str = "auto"
    """cuda, mps or cpu; auto takes the first that is there."""
    loaders: Annotated[int, Field(ge=0)] = 1
    """Processes that make batches; 0 makes them in between."""
    checkpoint_minutes: Annotated[float, Field(gt=0)] = 5.0
    """Between two checkpoints."""
    overwrite: bool = False
    """Start anew where a checkpoint stands."""
    optimizer: Annotated[OptimizerConfig, _FLAT]

    @model_validator(mode="after")
    def _stages_follow(self) -> Self:
        ends = [Stage.parse(text).until for text in self.stages]
        if ends != sorted(ends) or not ends or ends[-1] != 1:
            raise ValueError("stages must end one after the other, the last at 1")
        return self


def train_model(*, config: Annotated[TrainConfig, _FLAT]) -> int:
    """Train encoder and decoder together, as SAM was: clicks in, masks out.

    Killed and started again, it goes on at the step of its last checkpoint. Exit codes: 0 done; 2 settings; 3 no
    such data, weights or device; 5 the loss is no number; 130 interrupted.
    """
    device = pick_device(config.device)
    source = _source(config)
    stages = [Stage.parse(text) for text in config.stages]
    model = _model(config, stages[0].image_size).to(memory_format=torch.channels_last).to(device)
    training = Training(
        _objective(config, model),
        model,
        config.optimizer,
    )
    settings = config.model_dump(
        mode="json",
        exclude={"output", "device", "loaders", "checkpoint_minutes", "overwrite"},
    )
    checkpoints = Checkpoints(f"{config.output}.training", config.checkpoint_minutes, settings)
    if not config.overwrite and checkpoints.resume(training):
        _log.info("going on: %s", training.in_words())
    for stage in stages:
        if training.progress < stage.until:
            model.set_image_size(stage.image_size)
            training.run(_batches(source, stage, config, training.position.step), stage.until, checkpoints)
            checkpoints.write(training)
    storage.write_atomic(config.output, export(training, stages[-1].image_size))
    _log.info("wrote %s after %s", storage.redact(config.output), training.in_words())
    return 0


def _objective(config: TrainConfig, model: SamModel) -> Coupled:
    torch.manual_seed(config.seed)
    return Coupled(
        model,
        box_share=config.box_share,
        corrective_clicks=config.corrective_clicks,
        grouping=config.grouping,
        grouping_alone=config.grouping_steps,
    ).to(model.device)


def _model(config: TrainConfig, image_size: int) -> SamModel:
    if config.checkpoint is not None:
        return load_model(config.checkpoint, "cpu", image_size=image_size)
    return seeded_model(config.seed, image_size)


def _source(config: TrainConfig) -> Source:
    sources, shares = [], []
    surfaces: list[Any] = []
    if config.masks is not None:
        sources.append(masks_source(config.masks))
        shares.append(1.0)
    if config.bsds is not None:
        photographs = [bsds.read_photograph(path) for path in bsds.photographs(config.bsds, "train")]
        surfaces = [photograph.rgb_HW3 for photograph in photographs]
        sources.append(bsds_source(photographs))
        shares.append(1.0)
    if config.scenes:
        part = _SCENE_SIZE / Stage.parse(config.stages[-1]).image_size
        sources.append(scene_source(_SCENE_SIZE, config.seed, surfaces, min(1.0, part)))
        shares.append(config.scenes)
    if not sources:
        raise SettingsError("There is nothing to train on: give --bsds, --masks or --scenes.")
    return mixed(sources, shares)


def _batches(source: Source, stage: Stage, config: TrainConfig, first: int) -> Iterator[Any]:
    batches = Batches(
        source,
        image_size=stage.image_size,
        pictures=stage.pictures,
        prompts=config.prompts,
        seed=config.seed,
        natural_size=Stage.parse(config.stages[-1]).image_size,
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
