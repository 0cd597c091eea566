"""The settings of a curation: frozen, validated where they are made.

No step is taken unless a setting asks for it. `docs/curation.md` has each step's rule.
"""

from typing import Annotated, Any, ClassVar, Literal

from cyclopts import Parameter
from pydantic import BaseModel, ConfigDict, Field, model_validator

import pipeline
from pipeline.config import Fraction, Kind
from schemas import curated, manifest, masks

Priority = Literal["smallest", "best"]
"""Whose a pixel is that several masks have: the smallest one's, or that of the highest predicted IoU."""


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StepsConfig(_Settings):
    """What is done with an image's masks, in the order of these settings."""

    pred_iou_thresh: float | None = None
    """Keep masks whose predicted IoU is above this; 0 or less keeps all."""
    stability_score_thresh: float | None = None
    """Keep masks whose stability score is at least this; 0 or less keeps all."""
    box_nms_thresh: Fraction | None = None
    """Box IoU above which the mask of the lower predicted IoU is a duplicate, within a crop."""
    crop_nms_thresh: Fraction | None = None
    """Box IoU above which masks of different crops are duplicates; the smaller crop's stays."""
    min_mask_region_area: Annotated[int, Field(ge=0)] = 0
    """Remove islands and holes smaller than this many pixels; 0 leaves masks as they are."""
    min_area: Annotated[int, Field(ge=0)] = 0
    """Keep masks of at least so many pixels."""
    max_area: Annotated[int | None, Field(ge=0)] = None
    """Keep masks of at most so many pixels."""
    min_area_fraction: Fraction = 0.0
    """Keep masks of at least this share of the image."""
    max_area_fraction: Fraction = 1.0
    """Keep masks of at most this share of the image."""
    max_aspect_ratio: Annotated[float | None, Field(ge=1)] = None
    """Keep masks whose box's longer side is at most so many times the shorter."""
    max_border_sides: Annotated[int, Field(ge=0, le=4)] = 4
    """Keep masks that touch at most so many of the image's four sides."""
    max_hole_fraction: Fraction = 1.0
    """Keep masks whose holes are at most this share of mask and holes together."""
    mask_iou_thresh: Fraction | None = None
    """Mask IoU above which the mask of the lower predicted IoU is a duplicate."""
    containment_thresh: Fraction | None = None
    """Share of a mask inside one of a higher predicted IoU above which it goes. This takes parts away too."""
    hierarchy_thresh: Annotated[float | None, Field(gt=0, le=1)] = None
    """A mask's parent is the smallest larger one that holds at least this share of it."""
    flatten: Priority | None = None
    """Give each pixel to one mask: the smallest, or the best."""

    @model_validator(mode="after")
    def _not_less_than_the_least(self) -> "StepsConfig":
        if self.max_area is not None and self.max_area < self.min_area:
            raise ValueError(f"max_area {self.max_area} is below min_area {self.min_area}")
        if self.max_area_fraction < self.min_area_fraction:
            raise ValueError(
                f"max_area_fraction {self.max_area_fraction} is below min_area_fraction {self.min_area_fraction}"
            )
        return self


class CurationConfig(_Settings):
    """One run of `jobs.curate_masks`."""

    kind: ClassVar[Kind] = "masks"

    input: str
    """What jobs.generate_masks or jobs.curate_masks was given as --output: a finished run."""
    output: str
    """Folder or prefix that receives run.json, manifest/, masks/, progress.json and summary.json."""
    steps: Annotated[StepsConfig, Parameter(name="*")] = StepsConfig()
    overwrite: bool = False
    """Delete the curated run that the output holds, the same one too, and start anew."""
    retry_failed: bool = False
    """Do the finished shards again that hold failed images, where the input may have been mended."""
    num_workers: Annotated[int | None, Field(ge=1)] = None
    """Shards at the same time at most, one CPU each; by default as many as the cluster has CPUs."""

    def determinants(self, source: dict[str, Any]) -> dict[str, Any]:
        """All that decides what the rows say, as JSON: what decided the input's, which run that is, and the steps.

        Args:
            source: What the input's `run.json` says.
        """
        before: dict[str, Any] = source["determinants"]
        return before | {
            "source": {"fingerprint": source["fingerprint"], "manifest": source["manifest"]["digest"]},
            "curation": self.steps.model_dump(mode="json"),
            "code": pipeline.__version__,
            "schema": {
                "manifest": manifest.SCHEMA_VERSION,
                "masks": masks.SCHEMA_VERSION,
                "curated": curated.SCHEMA_VERSION,
            },
        }
