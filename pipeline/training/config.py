"""Settings of a training: frozen, validated where they are made."""

from pathlib import Path
from typing import Annotated, Literal, Self

from cyclopts import Parameter
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from pipeline.training.scenes import HELD_OUT_SEED

Student = Literal["tiny_vit_5m", "tiny_vit_11m", "tiny_vit_21m"]


class DescentConfig(BaseModel):
    """How weights are changed, however long for."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw for all weights; muon for the matrices of linear layers, scaled so that it takes AdamW's learning
    rates (https://arxiv.org/abs/2502.16982), and AdamW for the others. Muon always computes in bfloat16."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-4
    """At its peak."""
    final_rate: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Share of it that is left at the end of the cosine."""
    warmup_steps: Annotated[int, Field(ge=0)] = 250
    """Steps in which the learning rate rises to its peak."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """AdamW's; biases, norms and embeddings have none."""
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest norm of the gradient; 0 leaves it."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Of the average of the weights, which is what is exported; 0 exports the weights themselves."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16 for bfloat16 arithmetic under autocast; the weights stay float32. On a CPU without instructions for it,
    fp32 is many times faster."""


class OptimizerConfig(DescentConfig):
    """How weights are changed."""

    steps: Annotated[int | None, Field(ge=1)] = None
    """Updates of the weights in all."""
    minutes: Annotated[float | None, Field(gt=0)] = None
    """Or time to train for, in all; the schedule follows it."""

    @model_validator(mode="after")
    def _one_way_to_end(self) -> Self:
        if (self.steps is None) == (self.minutes is None):
            raise ValueError("give steps or minutes, not both")
        return self


class DistillConfig(BaseModel):
    """One training of `jobs.distill`.

    What https://arxiv.org/abs/2306.14289 says is the default: TinyViT 5M (section 4.1), 8 epochs (4.1) of batches
    of 8 on one GPU (4.2, the best of its ablation). It is silent about the optimiser and its numbers, about the
    first weights, and about padding; its authors left the question open in issue 88 of their repository. Those are
    this project's defaults.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    store: str
    """The teacher's embeddings: what `jobs.embed_images` was given as --output."""
    output: str
    """Address of the .safetensors file to write; its checkpoint stands beside it, with `.training` added."""
    student: Student = "tiny_vit_5m"
    """The image encoder to train."""
    imagenet: bool = False
    """Begin from timm's weights for ImageNet-22k, fetched from Hugging Face, instead of random ones."""
    decoder: str | None = None
    """The teacher's weights, whose prompt encoder and mask decoder the student gets: a model's name or the URI of
    its file; by default where the store says that they were."""
    batch_size: Annotated[int, Field(ge=1)] = 8
    """Pictures a step, over all workers together."""
    epochs: Annotated[float, Field(gt=0)] = 8.0
    """How often each picture is seen."""
    steps: Annotated[int | None, Field(ge=1)] = None
    """Updates of the weights, instead of epochs."""
    with_padding: bool = False
    """Let the places of an embedding count in which there is only padding."""
    shards_mixed: Annotated[int, Field(ge=1)] = 4
    """Shards of the store whose pictures are shuffled together; two such groups are held in memory."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the first weights and of the pictures' order."""
    device: str = "auto"
    """cuda, mps or cpu; auto takes the first that is there."""
    num_workers: Annotated[int | None, Field(ge=1)] = None
    """Processes to train in, by Ray Train, each with a device of its own; by default this one, without Ray."""
    read_ahead: Annotated[int, Field(ge=1, le=256)] = 16
    """Pictures that a worker reads and decodes ahead."""
    checkpoint_minutes: Annotated[float, Field(gt=0)] = 5.0
    """Between two checkpoints."""
    overwrite: bool = False
    """Start anew where a checkpoint stands."""
    descent: Annotated[DescentConfig, Parameter(name="*")] = DescentConfig()

    @model_validator(mode="after")
    def _batches_divide(self) -> Self:
        if self.batch_size % (self.num_workers or 1):
            raise ValueError(f"a batch of {self.batch_size} cannot be divided by {self.num_workers} workers")
        return self


class Stage(BaseModel):
    """A part of a training at one size of input."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image_size: Annotated[int, Field(ge=64, multiple_of=16)]
    pictures: Annotated[int, Field(ge=1)]
    """A batch."""
    until: Annotated[float, Field(gt=0, le=1)]
    """Progress at which it ends."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """From SIZE:PICTURES:UNTIL.

        Raises:
            ValueError: it is something else.
        """
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
    """Weight of synthetic scenes among the examples; each other source weighs 1."""
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
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the weights and of all that is drawn; not that of the scenes which are kept for measuring."""
    device: str = "auto"
    """cuda, mps or cpu; auto takes the first that is there."""
    loaders: Annotated[int, Field(ge=0)] = 1
    """Processes that make batches; 0 makes them in between."""
    checkpoint_minutes: Annotated[float, Field(gt=0)] = 5.0
    """Between two checkpoints."""
    overwrite: bool = False
    """Start anew where a checkpoint stands."""
    optimizer: Annotated[OptimizerConfig, Parameter(name="*")] = OptimizerConfig.model_construct()

    @property
    def parts(self) -> tuple[Stage, ...]:
        """The stages, parsed."""
        return tuple(map(Stage.parse, self.stages))

    @field_validator("stages")
    @classmethod
    def _stages_follow(cls, stages: tuple[str, ...]) -> tuple[str, ...]:
        ends = [Stage.parse(text).until for text in stages]
        if ends != sorted(set(ends)) or not ends or ends[-1] != 1:
            raise ValueError("stages must end one after the other, the last at 1")
        return stages

    @model_validator(mode="after")
    def _ends(self) -> Self:
        if self.optimizer.steps is None and self.optimizer.minutes is None:  # no flag of the optimizer was given
            raise ValueError("give steps or minutes")
        return self

    @field_validator("seed")
    @classmethod
    def _not_what_is_measured_on(cls, seed: int) -> int:
        if seed == HELD_OUT_SEED:
            raise ValueError(f"the scenes of seed {seed} are those that models are measured on; take another")
        return seed
