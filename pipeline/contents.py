"""What the rows of a run's shards hold of an image: its masks, or the teacher's embedding of it.

Everything else of a shard is the same for both: `pipeline.shard`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.config import Kind
from schemas.curated import CURATED_SCHEMA
from schemas.embeddings import embeddings_schema
from schemas.masks import MASKS_SCHEMA

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
    images_per_batch: int = 1
    """Images that are begun together, where there is `of_images`."""
    of_images: Callable[[list[NDArray[np.uint8]]], list[Callable[[], Row]]] | None = None
    """Begins several images: for each what ends it, as `of_image` does."""
    of_failure: Row
    """The same columns of an image that failed."""


def schema_of(kind: Kind, determinants: dict[str, Any]) -> pa.Schema:
    """The schema of a run's shards, by what its `run.json` says of it."""
    if kind == "embeddings":
        return embeddings_schema(determinants["image_size"])
    return CURATED_SCHEMA if "curation" in determinants else MASKS_SCHEMA


def rows_of(table: pa.Table) -> list[Row]:
    """A part of a shard as rows; embeddings are float16 arrays 256 x S/16 x S/16, which share its memory."""
    if "embedding" not in table.schema.names:
        return table.to_pylist()
    embeddings = [cell.to_numpy() if cell.is_valid else None for cell in table["embedding"]]
    rows = table.drop_columns("embedding").to_pylist()
    return [row | {"embedding": embedding} for row, embedding in zip(rows, embeddings, strict=True)]
