"""The settings of a measurement: frozen, validated where they are made."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from pydantic import BaseModel, ConfigDict, Field

from pipeline.config import AmgConfig, ModelConfig
from pipeline.training.bsds import Split

_FLAT = Parameter(name="*")


class EvaluationConfig(BaseModel):
    """One run of `jobs.evaluate_model`."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    bsds: Path | None = None
    """Folder of BSDS500, with images/ and groundTruth/."""
    split: Split = "val"
    """Which part of BSDS500."""
    scenes: Annotated[int, Field(ge=0)] = 0
    """Synthetic scenes, of those that no model was trained on."""
    scene_size: Annotated[int, Field(ge=64)] = 512
    """Height and width of the scenes in pixels."""
    images: str | None = None
    """Pictures without masks, to compare with a teacher on: whatever jobs.generate_masks takes."""
    limit: Annotated[int | None, Field(ge=1)] = None
    """Use so many pictures of BSDS500 and of --images at most."""
    teacher: Literal["mobile_sam", "demo", "vit_b", "vit_l", "vit_h"] | None = None
    """Compare with published weights; with a teacher's checkpoint, what it must be."""
    teacher_checkpoint: str | None = None
    """Compare with the model in this file."""
    teacher_image_size: Annotated[int | None, Field(ge=64, multiple_of=16)] = None
    """Side of the teacher's input; by default what its weights were made for, else 1024."""
    prompts_per_side: Annotated[int, Field(ge=1)] = 8
    """Prompts along a side of the grid on which model and teacher are compared."""
    peers: bool = False
    """Also measure an untrained model and Felzenszwalb's segmentation."""
    output: str | None = None
    """Also write the tables there: .md as printed, .json with all digits."""
    amg: Annotated[AmgConfig, _FLAT] = AmgConfig()
    model: Annotated[ModelConfig, _FLAT] = ModelConfig()

    @property
    def teacher_model(self) -> ModelConfig | None:
        """The teacher, on the model's device and at its precision; None if there is none."""
        if self.teacher is None and self.teacher_checkpoint is None:
            return None
        return ModelConfig(
            model=self.teacher,
            checkpoint=self.teacher_checkpoint,
            device=self.model.device,
            precision=self.model.precision,
            image_size=self.teacher_image_size,
        )
