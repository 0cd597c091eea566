"""The settings of an export: frozen, validated where they are made."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from pipeline.curation.config import Priority

Format = Literal["coco", "sa1b", "yolo-seg", "png", "panoptic"]


class ExportConfig(BaseModel):
    """One run of `jobs.export_masks`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    input: str
    """What jobs.generate_masks or jobs.curate_masks was given as --output: a finished run."""
    output: str
    """Folder or prefix that receives the files and export.json, which says what became of every mask."""
    format: Format
    """coco: one JSON; sa1b: a JSON an image; yolo-seg: a text an image, of polygons; png: a 16-bit picture of
    instance numbers an image; panoptic: COCO's pictures and JSON."""
    flatten: Priority = "smallest"
    """Of png and panoptic, where masks overlap: whose a pixel is that several have."""
    tolerance: Annotated[float, Field(ge=0)] = 0.0
    """Of yolo-seg: how far a simplified polygon may lie from the mask's contour, in pixels."""

    def determinants(self, source: dict[str, Any]) -> dict[str, Any]:
        """All that decides the files, as JSON.

        Args:
            source: What the input's `run.json` says.
        """
        own = {"png": {"flatten"}, "panoptic": {"flatten"}, "yolo-seg": {"tolerance"}}.get(self.format, set())
        return {"source": source["fingerprint"], **self.model_dump(mode="json", include={"format", *own})}
