"""What the rows of a run's shards hold of an image: its masks, or the teacher's embedding of it.

Everything else of a shard is the same for both: `pipeline.shard`.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.amg import MaskGenerator
from pipeline.config import Kind, LoadedWeights, MasksConfig, RunConfig
from pipeline.errors import ImageError
from pipeline.model import SamModel
from pipeline.phases import PhaseClock
from schemas.curated import CURATED_SCHEMA
from schemas.embeddings import embeddings_schema
from schemas.masks import MASKS_SCHEMA, Status

Row = dict[str, Any]
MASKS_ROWS_PER_GROUP: Final = 64
FUNNEL: Final = "funnel"
"""The key of an image's `pipeline.amg.funnel.Funnel`, which is summed into the footer and no column."""
SECONDS: Final = "seconds"
"""The key of what an image's phases took, `pipeline.phases.Phase`, which is told and no column."""


@dataclass(frozen=True, kw_only=True)
class Content:
    """One of the two kinds."""

    schema: pa.Schema
    rows_per_group: int
    encoding: dict[str, Any] = field(default_factory=dict)
    """Arguments of `pyarrow.parquet.ParquetWriter`."""
    of_image: Callable[[NDArray[np.uint8]], Row]
    """The columns of one RGB image, H x W x 3; with `status` where that is not OK, `SECONDS`, and for masks
    `FUNNEL`. Raises `ImageError`."""
    of_failure: Row
    """The same columns of an image that failed."""


def schema_of(kind: Kind, determinants: dict[str, Any]) -> pa.Schema:
    """The schema of a run's shards, by what its `run.json` says of it."""
    if kind == "embeddings":
        return embeddings_schema(determinants["image_size"])
    return CURATED_SCHEMA if "curation" in determinants else MASKS_SCHEMA


def weights_of(model: SamModel) -> LoadedWeights:
    """What decides a run's rows and only the loaded model knows."""
    return LoadedWeights(model.weights_sha256, model.image_size, model.architecture, model.thresholds)


def content_of(config: RunConfig, model: SamModel) -> Content:
    """What the run of these settings makes, with a model that is loaded and checked."""
    if isinstance(config, MasksConfig):
        return masks_content(MaskGenerator(model, **config.amg.model_dump()))
    return embeddings_content(model)


def masks_content(generator: MaskGenerator) -> Content:
    """All masks of an image."""

    def of_image(rgb_HW3: NDArray[np.uint8]) -> Row:
        clock = PhaseClock(generator.model.device)
        masks, funnel = generator.generate_with_funnel(rgb_HW3, clock=clock)
        status = Status.OK if masks else Status.EMPTY
        return {"masks": masks, "status": status, FUNNEL: asdict(funnel), SECONDS: clock.seconds()}

    return Content(
        schema=MASKS_SCHEMA, rows_per_group=MASKS_ROWS_PER_GROUP, of_image=of_image, of_failure={"masks": []}
    )


def embeddings_content(teacher: SamModel) -> Content:
    """The embedding of an image, rounded to float16.

    Noise compresses little, but the byte with sign and exponent does once it stands apart: zstd of split bytes
    leaves three quarters, at the cost of a copy. Checksums, because damaged numbers are numbers too.
    """

    def of_image(rgb_HW3: NDArray[np.uint8]) -> Row:
        clock = PhaseClock(teacher.device)
        with clock.phase("encode"):
            encoded = teacher.encode(rgb_HW3)
            embedding_CGG = encoded.features_1CHW[0].half().cpu().numpy()
        if not np.isfinite(embedding_CGG).all():
            raise ImageError(Status.UNSUPPORTED, "the teacher's embedding of it is not finite in float16")
        height, width = encoded.input_size
        columns = {"input_height": height, "input_width": width, "embedding": embedding_CGG.reshape(-1)}
        return columns | {SECONDS: clock.seconds()}

    return Content(
        schema=embeddings_schema(teacher.image_size),
        rows_per_group=4,
        encoding={
            "use_dictionary": False,
            "write_statistics": ["image_id"],
            "column_encoding": {"embedding.list.element": "BYTE_STREAM_SPLIT"},
            "write_page_checksum": True,
        },
        of_image=of_image,
        of_failure={"input_height": None, "input_width": None, "embedding": None},
    )


def rows_of(table: pa.Table) -> list[Row]:
    """A part of a shard as rows; embeddings are float16 arrays 256 x S/16 x S/16, which share its memory."""
    if "embedding" not in table.schema.names:
        return table.to_pylist()
    embeddings = [cell.to_numpy() if cell.is_valid else None for cell in table["embedding"]]
    rows = table.drop_columns("embedding").to_pylist()
    return [row | {"embedding": embedding} for row, embedding in zip(rows, embeddings, strict=True)]
