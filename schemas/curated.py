"""A curated masks dataset: the masks table with where masks lie in one another, and what they leave uncovered.

What reads `schemas.masks.MASKS_SCHEMA` by column names reads this too.
"""

from typing import Any, Final

import pyarrow as pa

from schemas.masks import MASK, OUTCOME_FIELDS

SCHEMA_VERSION: Final = 1

CURATED_MASK: Final = pa.struct(
    [
        *MASK,
        pa.field("parent_id", pa.int32()),  # place in the row's list; null for a root, or where not asked for
        pa.field("depth", pa.int32()),  # 0 for a root; null where not asked for
    ]
)

_MASKS: "pa.Field[Any]" = pa.field(
    "masks", pa.list_(pa.field("element", CURATED_MASK, nullable=False)), nullable=False
)

CURATED_SCHEMA: Final = pa.schema(
    [
        *OUTCOME_FIELDS,
        _MASKS,
        pa.field("coverage", pa.float64()),  # share of the image's pixels in at least one mask; null if it failed
        pa.field("uncovered_area", pa.int64()),  # pixels in none; null if it failed
    ]
)
