"""One image's bytes, from an object, a tar or a row of a Parquet file."""

import bisect
import functools
import threading
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import ImageError, StorageError
from pipeline.sources.containers import DAMAGE, damage, parquet_layout
from pipeline.sources.refs import ImageRef
from schemas.masks import Status

_BATCH_ROWS: Final = 64  # a batch of images must stay below Arrow's 2 GiB an array


def fetch(ref: ImageRef, *, max_bytes: int) -> bytes:
    """The encoded bytes of one image, `max_bytes` at most. Safe from several threads.

    Raises:
        ImageError: `TOO_LARGE`, `FETCH_FAILED` (not there, not allowed, attempts exhausted), `CHANGED`
            (another size or version than listed), `EMPTY_FILE` (a Parquet row that is null), or for a damaged
            container `TRUNCATED` or `NOT_AN_IMAGE`.
    """
    if ref.size is not None and ref.size > max_bytes:
        raise _too_large(ref, ref.size, max_bytes)
    try:
        if ref.container is None:
            return _fetch_object(ref, max_bytes)
        if ref.position is None:
            raise damage(ref, ref.container)
        if ref.size is None:
            return _fetch_row(ref, ref.container, ref.position, max_bytes)
        data = storage.read_bytes(ref.container, ref.position, ref.size, etag=ref.etag)
    except storage.ChangedError as error:
        raise ImageError(Status.CHANGED, str(error)) from error
    except StorageError as error:
        raise ImageError(Status.FETCH_FAILED, str(error)) from error
    if len(data) != ref.size:
        raise _changed(ref, f"{ref.size} bytes were listed and {len(data)} are there")
    return data


def _fetch_object(ref: ImageRef, max_bytes: int) -> bytes:
    # One byte more than expected shows that there is more, and bounds what is read if there is much more.
    expected = max_bytes if ref.size is None else ref.size
    data = storage.read_bytes(ref.uri, 0, expected + 1, etag=ref.etag)
    if ref.size is not None and len(data) != ref.size:
        found = "more" if len(data) > ref.size else str(len(data))
        raise _changed(ref, f"{ref.size} bytes were listed and {found} are there")
    if len(data) > max_bytes:
        raise _too_large(ref, None, max_bytes)
    return data


def _fetch_row(ref: ImageRef, container: str, row: int, max_bytes: int) -> bytes:
    try:
        with _rows_lock:
            first_rows = _kept_layout(container, ref.etag).first_rows
            if row >= first_rows[-1]:
                raise _changed(ref, f"it has {first_rows[-1]} rows")
            group = bisect.bisect_right(first_rows, row) - 1
            value = _row_group(container, ref.etag, group)[row - first_rows[group]]
    except DAMAGE as error:
        message = f"{storage.redact(ref.uri)}: the file is damaged: {error}"
        raise ImageError(Status.TRUNCATED, message) from error
    if not value.is_valid:
        raise ImageError(Status.EMPTY_FILE, f"{storage.redact(ref.uri)}: the row holds no bytes (null)")
    data = value.as_buffer()
    if data.size > max_bytes:
        raise _too_large(ref, data.size, max_bytes)
    return bytes(data)


# Consecutive rows share a row group, so the last ones stay; the lock keeps threads from reading one twice.
_ROW_GROUPS_KEPT: Final = 2
_rows_lock: Final = threading.Lock()
_kept_layout: Final = functools.lru_cache(_ROW_GROUPS_KEPT)(parquet_layout)


@functools.lru_cache(_ROW_GROUPS_KEPT)
def _row_group(uri: str, etag: str | None, group: int) -> "pa.ChunkedArray[Any]":
    layout = _kept_layout(uri, etag)
    with storage.open_input(uri, etag=etag) as stream:
        parquet = pq.ParquetFile(stream, metadata=layout.metadata)
        batches = parquet.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[layout.column])
        columns = [batch.column(0) for batch in batches]
    if "." in str(layout.column):
        columns = [pc.struct_field(column, "bytes") for column in columns]
    return pa.chunked_array(columns)


def _too_large(ref: ImageRef, size: int | None, max_bytes: int) -> ImageError:
    found = "more" if size is None else f"{size} bytes"
    return ImageError(Status.TOO_LARGE, f"{storage.redact(ref.uri)}: {found}, {max_bytes} bytes are allowed")


def _changed(ref: ImageRef, what: str) -> ImageError:
    return ImageError(Status.CHANGED, f"{storage.redact(ref.uri)} has changed since it was listed: {what}")
