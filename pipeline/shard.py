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
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, Self, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline import manifest, sources, storage
from pipeline.config import Kind, RunConfig
from pipeline.contents import FUNNEL, MASKS_ROWS_PER_GROUP, SECONDS, Content, Row, rows_of
from pipeline.errors import ImageError, StorageError
from pipeline.manifest import ManifestRow
from pipeline.memory import is_out_of_memory
from pipeline.phases import Phase
from schemas.masks import PROCESSED, Status

FOOTER_KEY: Final = b"everymask"
_DECODED_AHEAD: Final = 2
_IN_MEMORY_BYTES: Final = 2**26  # of a shard's file; beyond, it grows in a temporary file
_READING: Final = "reading"  # the key of an image's `Reading`, which is told and no column

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
OnBegin = Callable[[int, str], None]
"""Told before each image, when its bytes or pixels are waited for: its `image_id` and URI."""
Decode = Callable[[bytes], NDArray[np.uint8]]
"""From an image file's bytes to RGB, H x W x 3; raises `ImageError`. Called by several threads at once."""


@dataclass(frozen=True)
class Reading:
    """How reading stood when an image was done."""

    bytes: int
    """Of the image's file; 0 where it could not be fetched."""
    in_flight: int
    """Images of the shard that were begun, of which there was no row yet."""
    fetched: int
    """Of these, those that were fetched and not yet decoded."""
    decoded: int
    """Of these, those that were decoded."""


@dataclass(frozen=True)
class ImageDone:
    """One image's outcome, for whoever watches."""

    image_id: int
    uri: str
    """As in the row, so possibly with credentials."""
    status: str
    masks: int
    seconds: Mapping[Phase, float]
    """By phase; what was not measured is absent."""
    reading: Reading | None
    """None where the rows are made of other rows."""

    @property
    def failed(self) -> bool:
        """Whether the image is neither ok nor empty."""
        return self.status not in PROCESSED


OnImage = Callable[[ImageDone], None]
"""Told after each image."""


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
    decode: Decode,
    provenance: dict[str, Any],
    *,
    on_begin: OnBegin = lambda *_: None,
    on_image: OnImage = lambda _: None,
    before_write: Callable[[], None] = lambda: None,
) -> ShardSummary:
    """Make the rows of a shard's images and write its file, whole or not at all.

    Args:
        shard: Its number.
        config: The run's settings.
        content: Makes what the rows hold.
        decode: Decodes an image.
        provenance: JSON for the footer: fingerprint, determinants of the rows.
        on_begin: Progress, before each image.
        on_image: Progress, after each image.
        before_write: Called when the file is ready to be written; what it raises prevents that.

    Raises:
        StorageError: the manifest cannot be read or the file cannot be written.
    """
    return write_shard(
        shard_uri(config.output, config.kind, shard),
        shard,
        _outcomes(manifest.read_shard(config.output, shard), config, content, decode, on_begin),
        content.schema,
        provenance,
        rows_per_group=content.rows_per_group,
        encoding=content.encoding,
        on_image=on_image,
        before_write=before_write,
    )


def write_shard(
    uri: str,
    shard: int,
    rows: Iterable[Row],
    schema: pa.Schema,
    provenance: dict[str, Any],
    *,
    rows_per_group: int = MASKS_ROWS_PER_GROUP,
    encoding: Mapping[str, Any] | None = None,
    on_image: OnImage = lambda _: None,
    before_write: Callable[[], None] = lambda: None,
) -> ShardSummary:
    """Write a shard's rows as they come, with what they sum up to in the footer, whole or not at all.

    Args:
        uri: The file's.
        shard: Its number.
        rows: In order; a row group of them is in memory at a time.
        schema: Theirs.
        provenance: JSON for the footer.
        rows_per_group: Rows a row group.
        encoding: Arguments of `pyarrow.parquet.ParquetWriter`.
        on_image: Progress, after each image.
        before_write: Called when the file is ready to be written; what it raises prevents that.

    Raises:
        StorageError: it cannot be written.
    """
    start = time.monotonic()
    statuses: Counter[str] = Counter()
    funnel: Counter[str] = Counter()
    masks = 0

    def counted_rows() -> Iterator[Row]:
        nonlocal masks
        for row in rows:
            statuses[row["status"]] += 1
            funnel.update(row.pop(FUNNEL, {}))
            found = len(row.get("masks", ()))
            masks += found
            seconds, reading = row.pop(SECONDS, {}), row.pop(_READING, None)
            on_image(ImageDone(row["image_id"], row["uri"], row["status"], found, seconds, reading))
            yield row

    counted = counted_rows()
    with tempfile.SpooledTemporaryFile(_IN_MEMORY_BYTES) as file:
        with pq.ParquetWriter(file, schema, compression="zstd", **(encoding or {})) as writer:
            while group := list(itertools.islice(counted, rows_per_group)):
                writer.write_table(pa.Table.from_pylist(group, schema=schema))
            seconds = round(time.monotonic() - start, 3)
            summary = ShardSummary(shard, statuses.total(), masks, dict(statuses), 0, seconds, dict(funnel))
            footer = provenance | {"summary": asdict(summary)}
            writer.add_key_value_metadata({FOOTER_KEY.decode(): json.dumps(footer)})
        size = file.tell()
        before_write()
        storage.write_atomic(uri, file)
    return replace(summary, bytes=size)


def read_rows(output: str, kind: Kind, shard: int, columns: list[str] | None = None) -> Iterator[Row]:
    """The rows of a finished shard, in order, a row group in memory at a time.

    Args:
        output: The run's.
        kind: What it makes.
        shard: The shard's number.
        columns: Names of those to read; all by default.

    Raises:
        StorageError: the file cannot be read, or is damaged.
    """
    uri = shard_uri(output, kind, shard)
    with storage.open_input(uri) as file:
        try:
            parquet = pq.ParquetFile(file)
            for group in range(parquet.num_row_groups):
                yield from rows_of(parquet.read_row_group(group, columns))
        except (pa.ArrowException, OSError) as error:
            raise StorageError(
                f"{storage.redact(uri)} is damaged: {error}. jobs.verify_masks --remove-damaged deletes it, and "
                "the command that made it makes it again."
            ) from error


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


@dataclass
class _Image:
    """An image on its way to its row."""

    row: ManifestRow
    begun: bool = False
    bytes: int = 0
    seconds: dict[Phase, float] = field(default_factory=dict)
    """Of the phases that are over."""


def _outcomes(
    rows: list[ManifestRow], config: RunConfig, content: Content, decode: Decode, on_begin: OnBegin
) -> Iterator[Row]:
    """Each image's row, in order. Reading and decoding run ahead in threads of their own."""
    reading = config.reading

    def fetch(image: _Image) -> bytes:
        image.begun = True
        with _timed(image, "fetch"):
            data = sources.fetch(image.row.ref, max_bytes=reading.max_bytes)
        image.bytes = len(data)
        return data

    def decode_fetched(image_and_data: tuple[_Image, Future[bytes]]) -> NDArray[np.uint8]:
        image, fetched = image_and_data
        data = fetched.result()
        with _timed(image, "decode"):
            return decode(data)

    images = [_Image(row) for row in rows]
    with (
        ThreadPoolExecutor(reading.read_ahead, "fetch") as fetchers,
        ThreadPoolExecutor(_DECODED_AHEAD, "decode") as decoders,
    ):
        fetched = ahead(fetchers, fetch, images, reading.read_ahead)
        pairs = zip(images, fetched, strict=True)
        decoded = ahead(decoders, decode_fetched, pairs, _DECODED_AHEAD)
        for number, (image, rgb_HW3) in enumerate(zip(images, decoded, strict=True), start=1):
            on_begin(image.row.image_id, image.row.ref.uri)
            outcome = _outcome(image.row, rgb_HW3, content)
            outcome[SECONDS] = image.seconds | outcome.get(SECONDS, {})
            # Nothing further ahead can have been begun.
            outcome[_READING] = _reading(image, images[number : number + reading.read_ahead + _DECODED_AHEAD])
            yield outcome


@contextmanager
def _timed(image: _Image, phase: Phase) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        image.seconds[phase] = time.perf_counter() - start


def _reading(done: _Image, behind: list[_Image]) -> Reading:
    decoded = sum("decode" in image.seconds for image in behind)
    fetched = sum("fetch" in image.seconds for image in behind)
    return Reading(done.bytes, sum(image.begun for image in behind), fetched - decoded, decoded)


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


def ahead(
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
