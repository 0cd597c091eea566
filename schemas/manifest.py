"""The manifest: one row per input image, `manifest/part-00000.parquet`, ...

Rows are sorted by where the bytes lie and numbered from 0. Every row group but the last of the manifest
holds exactly one shard's images, so a worker reads its shard as one row group.
"""

from typing import Any, Final

import pyarrow as pa

SCHEMA_VERSION: Final = 1

_FIELDS: "list[pa.Field[Any]]" = [
    pa.field("image_id", pa.int64(), nullable=False),
    # Where the image is, as fsspec reads it. A tar's member is `tar://MEMBER::URI`, an image in row N
    # of a Parquet file is `parquet://N::URI`.
    pa.field("uri", pa.string(), nullable=False),
    pa.field("size", pa.int64()),  # bytes; null where the source does not say
    pa.field("etag", pa.string()),  # the object's version, as its store names it
    pa.field("container", pa.string()),  # the tar or Parquet file's URI; null for a file of its own
    pa.field("position", pa.int64()),  # in a tar the byte offset of the data, in Parquet the row number
]

MANIFEST_SCHEMA: Final = pa.schema(_FIELDS)
