"""The teacher store: a row per input image, with a heavy encoder's embedding, `embeddings/part-00000.parquet`, ...

For decoupled distillation, https://arxiv.org/abs/2306.14289: a student learns these while no teacher runs.
"""

from typing import Any, Final

import pyarrow as pa

from schemas.masks import OUTCOME_FIELDS

SCHEMA_VERSION: Final = 1

CHANNELS: Final = 256
STRIDE: Final = 16
"""Pixels of the encoder's input along a side of one place of the embedding."""


def embedding_shape(image_size: int) -> tuple[int, int, int]:
    """Channels, rows and columns of an embedding, for a model whose input has this side in pixels."""
    return CHANNELS, image_size // STRIDE, image_size // STRIDE


def embedding_bytes(image_size: int) -> int:
    """What one embedding takes uncompressed: 2 MiB at image size 1024."""
    channels, rows, columns = embedding_shape(image_size)
    return channels * rows * columns * 2


def embeddings_schema(image_size: int) -> pa.Schema:
    """The schema for a model of this image size; `status` is `schemas.masks.Status` without `EMPTY`.

    An embedding is Arrow's canonical tensor: to readers that do not know it, a list of fixed length.
    """
    fields: list[pa.Field[Any]] = [
        *OUTCOME_FIELDS,
        pa.field("input_height", pa.int32()),  # after the resize, before padding to image_size x image_size
        pa.field("input_width", pa.int32()),
        pa.field("embedding", pa.fixed_shape_tensor(pa.float16(), embedding_shape(image_size))),  # null if not ok
    ]
    return pa.schema(fields)
