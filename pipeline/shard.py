"""One shard: its images in, one Parquet file out."""

import io
import itertools
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Self

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import manifest, storage
from pipeline.config import Kind, RunConfig
from pipeline.contents import FUNNEL, MASKS_ROWS_PER_GROUP, SECONDS, Content, Row, rows_of
from pipeline.errors import StorageError
from pipeline.outcomes import READING, Decode, OnBegin, Reading, outcomes
from pipeline.phases import Phase
from schemas.masks import PROCESSED

FOOTER_KEY: Final = b"everymask"
_IN_MEMORY_BYTES: Final = 2**26  # of a shard's file; beyond, it grows in a temporary file


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
        outcomes(manifest.read_shard(config.output, shard), config, content, decode, on_begin),
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
            seconds, reading = row.pop(SECONDS, {}), row.pop(READING, None)
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


def _failed(statuses: Mapping[str, int]) -> int:
    return sum(count for status, count in statuses.items() if status not in PROCESSED)
