"""The masks dataset: one row per input image, `masks/part-00000.parquet`, ...

The struct in `masks` has the keys of `segment_anything.SamAutomaticMaskGenerator`, so a row reads like
its return value.
"""

from enum import StrEnum
from typing import Any, Final

import pyarrow as pa

SCHEMA_VERSION: Final = 1


class Status(StrEnum):
    """What became of one image. Everything but `OK` and `EMPTY` is a failure, and its row has an `error`."""

    OK = "ok"
    """At least one mask."""
    EMPTY = "empty"
    """The image was processed and no mask passed the thresholds."""
    EMPTY_FILE = "empty_file"
    """Zero bytes."""
    TRUNCATED = "truncated"
    """The image data end too early."""
    NOT_AN_IMAGE = "not_an_image"
    """The bytes are no image of a known format."""
    TOO_LARGE = "too_large"
    """More pixels or bytes than the limits allow."""
    UNSUPPORTED = "unsupported"
    """An image of a kind that is not handled: bands, sample type, or no decoder installed."""
    FETCH_FAILED = "fetch_failed"
    """The bytes could not be read from storage."""
    CHANGED = "changed"
    """The object is not the one that was listed."""
    OUT_OF_MEMORY = "out_of_memory"
    """Memory did not suffice: the device's, even for one prompt at a time, the machine's, or decoding's limit."""
    DECODER_CRASH = "decoder_crash"
    """The process that decoded it died, twice."""
    TIMEOUT = "timeout"
    """Decoding took longer than allowed, twice."""


PROCESSED: Final = frozenset({Status.OK, Status.EMPTY})

SEGMENTATION: Final = pa.struct(
    [
        pa.field("size", pa.list_(pa.int32(), 2), nullable=False),  # height, width
        pa.field("counts", pa.string(), nullable=False),  # compressed COCO RLE
    ]
)

MASK: Final = pa.struct(
    [
        pa.field("segmentation", SEGMENTATION, nullable=False),
        pa.field("area", pa.int64(), nullable=False),  # pixels
        pa.field("bbox", pa.list_(pa.int32(), 4), nullable=False),  # x, y, width, height
        pa.field("predicted_iou", pa.float32(), nullable=False),
        pa.field("point_coords", pa.list_(pa.list_(pa.float64(), 2)), nullable=False),  # x, y
        pa.field("stability_score", pa.float32(), nullable=False),
        pa.field("crop_box", pa.list_(pa.int32(), 4), nullable=False),  # x, y, width, height
    ]
)

OUTCOME_FIELDS: "Final[tuple[pa.Field[Any], ...]]" = (
    pa.field("image_id", pa.int64(), nullable=False),
    pa.field("uri", pa.string(), nullable=False),
    pa.field("status", pa.string(), nullable=False),
    pa.field("error", pa.string()),
    pa.field("height", pa.int32()),  # as displayed, in pixels; null where the image was not decoded
    pa.field("width", pa.int32()),
)
"""What every row says of its image, whatever else it holds."""

_MASKS: "pa.Field[Any]" = pa.field("masks", pa.list_(pa.field("element", MASK, nullable=False)), nullable=False)

MASKS_SCHEMA: Final = pa.schema([*OUTCOME_FIELDS, _MASKS])
