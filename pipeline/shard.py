"""One shard: its images in, one Parquet file out.

The only place where an image's error becomes a row.
"""

import io
import itertools
import json
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Self, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline import manifest, sources, storage
from pipeline.config import Kind, RunConfig
from pipeline.contents import FUNNEL, Content, Row
from pipeline.errors import ImageError
from pipeline.images import decode_image
from pipeline.manifest import ManifestRow
from pipeline.model.memory import is_out_of_memory
from schemas.masks import PROCESSED, Status

FOOTER_KEY: Final = b"everymask"
_DECODED_AHEAD: Final = 2
_IN_MEMORY_BYTES: Final = 2**26  # of a shard's file; beyond, it grows in a temporary file

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
OnImage = Callable[[int, int, int], None]
"""Told after each image: images done, masks, failures of the shard so far."""


@dataclass(frozen=True)
class ShardSummary:
    """What a shard's file holds. Also in its footer."""

    shard: int
    images: int
    masks: int
    """0 where the rows hold embeddings."""
    statuses: dict[str, int]
    bytes: int
    """Of the Parquet file; 0 in its own footer."""
    seconds: float
    funnel: dict[str, int] | None = None
    """`pipeline.amg.funnel.Funnel`, summed over the images that were processed; empty where the rows hold
    embeddings, None of a file that was made before it was counted."""

    @property
    def failed(self) -> int:
        """Images that are neither ok nor empty."""
        return _failed(self.statuses)

    def to_json(self) -> str:
        """The summary as text, for Ray and for the footer."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Undo `to_json`."""
        return cls(**json.loads(text))


def shard_uri(output: str, kind: Kind, shard: int) -> str:
    """The file of a shard, `OUTPUT/masks/part-00042.parquet`."""
    return f"{output}/{kind}/part-{shard:05d}.parquet"


def make_shard(
    shard: int,
    config: RunConfig,
    content: Content,
    provenance: dict[str, Any],
    *,
    on_image: OnImage = lambda *_: None,
    before_write: Callable[[], None] = lambda: None,
) -> ShardSummary:
    """Make the rows of a shard's images and write its file, whole or not at all.

    Args:
        shard: Its number.
        config: The run's settings.
        content: Makes what the rows hold.
        provenance: JSON for the footer: fingerprint, determinants of the rows.
        on_image: Progress.
        before_write: Called when the file is ready to be written; what it raises prevents that.

    Raises:
        StorageError: the manifest cannot be read or the file cannot be written.
    """
    start = time.monotonic()
    statuses: Counter[str] = Counter()
    funnel: Counter[str] = Counter()
    masks = 0

    def counted_rows() -> Iterator[Row]:
        nonlocal masks
        for row in _outcomes(manifest.read_shard(config.output, shard), config, content):
            statuses[row["status"]] += 1
            funnel.update(row.pop(FUNNEL, {}))
            masks += len(row.get("masks", ()))
            on_image(statuses.total(), masks, _failed(statuses))
            yield row

    rows = counted_rows()
    with tempfile.SpooledTemporaryFile(_IN_MEMORY_BYTES) as file:
        with pq.ParquetWriter(file, content.schema, compression="zstd", **content.encoding) as writer:
            while group := list(itertools.islice(rows, content.rows_per_group)):
                writer.write_table(pa.Table.from_pylist(group, schema=content.schema))
            seconds = round(time.monotonic() - start, 3)
            summary = ShardSummary(shard, statuses.total(), masks, dict(statuses), 0, seconds, dict(funnel))
            footer = provenance | {"summary": asdict(summary)}
            writer.add_key_value_metadata({FOOTER_KEY.decode(): json.dumps(footer)})
        size = file.tell()
        before_write()
        storage.write_atomic(shard_uri(config.output, config.kind, shard), file)
    return replace(summary, bytes=size)


def read_footer(output: str, kind: Kind, shard: int) -> tuple[dict[str, Any], ShardSummary]:
    """The provenance and the summary in a shard's footer.

    Raises:
        StorageError: the file cannot be read.
        pyarrow.ArrowInvalid, ValueError, KeyError: it is damaged, or no shard.
    """
    with storage.open_input(shard_uri(output, kind, shard)) as file:
        metadata = pq.read_metadata(file)
        size = file.seek(0, io.SEEK_END)
    text = (metadata.metadata or {}).get(FOOTER_KEY)
    if text is None:
        raise ValueError("it is no shard: nothing in its footer says what run it is of")
    footer = json.loads(text)
    summary = footer.pop("summary")
    return footer, ShardSummary(**summary | {"bytes": size})


def _outcomes(rows: list[ManifestRow], config: RunConfig, content: Content) -> Iterator[Row]:
    """Each image's row, in order. Reading and decoding run ahead in threads of their own."""
    reading = config.reading

    def fetch(row: ManifestRow) -> bytes:
        return sources.fetch(row.ref, max_bytes=reading.max_bytes)

    def decode(fetched: Future[bytes]) -> NDArray[np.uint8]:
        return decode_image(fetched.result(), max_pixels=reading.max_pixels)

    with (
        ThreadPoolExecutor(reading.read_ahead, "fetch") as fetchers,
        ThreadPoolExecutor(_DECODED_AHEAD, "decode") as decoders,
    ):
        fetched = _ahead(fetchers, fetch, rows, reading.read_ahead)
        decoded = _ahead(decoders, decode, fetched, _DECODED_AHEAD)
        for row, image in zip(rows, decoded, strict=True):
            yield _outcome(row, image, content)


def _outcome(row: ManifestRow, decoded: Future[NDArray[np.uint8]], content: Content) -> Row:
    outcome: Row = {
        "image_id": row.image_id,
        "uri": row.ref.uri,
        "status": Status.OK,
        "error": None,
        "height": None,
        "width": None,
    }
    try:
        rgb_HW3 = decoded.result()
        outcome["height"], outcome["width"] = rgb_HW3.shape[:2]
        outcome |= content.of_image(rgb_HW3)
    except ImageError as error:
        outcome |= _failure(error.status, str(error), content)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        outcome |= _failure(Status.OUT_OF_MEMORY, f"no memory for this image: {error!r}", content)
    return outcome


def _failure(status: Status, error: str, content: Content) -> Row:
    return {"status": status, "error": storage.redact(error)} | content.of_failure


def _ahead(
    pool: ThreadPoolExecutor, work: Callable[[_Item], _Result], items: Iterable[_Item], depth: int
) -> Iterator[Future[_Result]]:
    """Futures of `work` on each item, in order, with at most `depth` begun before they are asked for."""
    pending: deque[Future[_Result]] = deque()
    for item in items:
        pending.append(pool.submit(work, item))
        if len(pending) > depth:
            yield pending.popleft()
    yield from pending


def _failed(statuses: Mapping[str, int]) -> int:
    return sum(count for status, count in statuses.items() if status not in PROCESSED)
