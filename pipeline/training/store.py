"""The teacher store as training reads it: what `jobs.embed_images` made, checked, in shards.

A shard's number is the unit of work. `open_store` is called once, its result is small and can be sent to workers;
each of them reads the shards of `shards_of`, or those that Ray hands out, with `read_shards`. What that yields
has a `Position`, which a checkpoint keeps:

    store = open_store("s3://bucket/teacher", expect=checkpoint.get("teacher"))
    mine = shards_of(store, rank, world_size, seed=seed, epoch=epoch)
    for position, stored in read_shards(store, mine, start=Position(*checkpoint.get("position", ()))):
        rgb_HW3 = decode_image(fetch(stored.ref, max_bytes=store.max_bytes), max_pixels=store.max_pixels)
        ...
    checkpoint = {"teacher": store.identity, "position": position}
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline import documents, manifest, storage
from pipeline.contents import Row, rows_of
from pipeline.errors import OutputConflict, TrainingDataError
from pipeline.manifest import ManifestRow
from pipeline.reading.order import dealt
from pipeline.reading.skipped import Damage
from pipeline.shard import read_footer, shard_uri
from pipeline.sources import ImageRef
from pipeline.verify import embedding_fault
from schemas.embeddings import SCHEMA_VERSION, embedding_shape, embeddings_schema
from schemas.masks import Status

_log = logging.getLogger("everymask")


@dataclass(frozen=True)
class TeacherStore:
    """A finished store, as its `run.json` describes it."""

    output: str
    fingerprint: str
    weights_sha256: str
    """Of the teacher's checkpoint."""
    architecture: str
    precision: str
    image_size: int
    """Side of the teacher's input in pixels."""
    manifest_digest: str
    images: int
    """In the manifest, with those that failed."""
    shards: int
    max_bytes: int
    """Of an image's file, for `pipeline.sources.fetch`."""
    max_pixels: int
    """Of an image, for `pipeline.images.decode_image`."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of an embedding: 256 x `image_size` / 16 x `image_size` / 16."""
        return embedding_shape(self.image_size)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the embeddings and their order, as JSON. Keep it, to give to `open_store` as `expect`."""
        facts = asdict(self)
        return {name: facts[name] for name in ("fingerprint", "weights_sha256", "image_size", "manifest_digest")}


@dataclass(frozen=True)
class StoredEmbedding:
    """What the teacher makes of one image."""

    image_id: int
    uri: str
    ref: ImageRef
    """Where the image's bytes are."""
    original_size: tuple[int, int]
    """Height and width of the image in pixels, as displayed."""
    input_size: tuple[int, int]
    """Height and width after the resize, before padding."""
    embedding_CGG: NDArray[np.float16]
    """256 x G x G, with G the image size / 16. Beyond `input_size` / 16 the image was padded."""


class Position(NamedTuple):
    """How far a list of shards was read."""

    shards: int = 0
    """Shards of the list that are behind."""
    row: int = 0
    """Rows of the next shard that are behind."""


_BEGINNING: Final = Position()


OnDamage = Callable[[Damage], None]


def _warn(damage: Damage) -> None:
    _log.warning("%s", damage)


def open_store(output: str, *, expect: Mapping[str, Any] | None = None) -> TeacherStore:
    """Look at a store before training from it.

    Args:
        output: What `jobs.embed_images` was given as --output.
        expect: Fields of `TeacherStore` that must have these values, such as `image_size` and
            `weights_sha256`, or the `identity` that a checkpoint kept.

    Raises:
        TrainingDataError: there is no store, it holds masks, shards are missing, it is of another version, or not
            as expected; the message names what differs.
        StorageError: the address cannot be read.
    """
    output = storage.canonical_uri(output)
    name = storage.redact(output)
    try:
        document = documents.read_document(output)
    except OutputConflict as error:
        raise TrainingDataError(f"{error} jobs.embed_images makes a teacher store.") from error
    if (kind := documents.kind_of(document)) != "embeddings":
        raise TrainingDataError(f"{name} is no teacher store: it holds {kind}. jobs.embed_images makes one.")
    determinants, listing = document["determinants"], document["manifest"]
    if (version := determinants["schema"][kind]) != SCHEMA_VERSION:
        raise TrainingDataError(f"{name} has version {version} of the schema, this is for {SCHEMA_VERSION}.")
    store = TeacherStore(
        output=output,
        fingerprint=document["fingerprint"],
        weights_sha256=determinants["weights_sha256"],
        architecture=determinants["architecture"],
        precision=determinants["precision"],
        image_size=determinants["image_size"],
        manifest_digest=listing["digest"],
        images=listing["images"],
        shards=listing["shards"],
        max_bytes=determinants["reading"]["max_bytes"],
        max_pixels=determinants["reading"]["max_pixels"],
    )
    facts = asdict(store)
    differing = [
        f"{key} ({facts.get(key)} there, {value} expected)"
        for key, value in (expect or {}).items()
        if facts.get(key) != value
    ]
    if differing:
        raise TrainingDataError(f"{name} is not the teacher store that is expected: {', '.join(differing)}.")
    if missing := set(range(store.shards)) - documents.shards_done(output, kind):
        raise TrainingDataError(
            f"{name} lacks {len(missing)} of {store.shards} shards, the first {min(missing)}; the command that "
            "began it makes them."
        )
    return store


def shards_of(store: TeacherStore, rank: int, world_size: int, *, seed: int, epoch: int) -> list[int]:
    """One worker's shards of an epoch, in an order that is the seed's and the epoch's.

    Those of all ranks are disjoint and together all; some ranks may have one more than others.

    Raises:
        SettingsError: there is no such rank.
    """
    return dealt(store.shards, rank, world_size, seed=seed, epoch=epoch)


def read_shards(
    store: TeacherStore,
    shards: Sequence[int],
    *,
    start: Position = _BEGINNING,
    on_damage: OnDamage = _warn,
) -> Iterator[tuple[Position, StoredEmbedding]]:
    """The embeddings of several shards, one after another.

    Args:
        store: Where they are.
        shards: Their numbers, in the order to read them.
        start: The last position that an earlier call with the same shards yielded: go on behind it.
        on_damage: As `read_shard`.

    Yields:
        An embedding, and the position behind it.

    Raises:
        StorageError, TrainingDataError: as `read_shard`.
    """
    for index in range(start.shards, len(shards)):
        first_row = start.row if index == start.shards else 0
        for row, stored in _read(store, shards[index], first_row, on_damage):
            yield Position(index, row + 1), stored


def read_shard(store: TeacherStore, shard: int, *, on_damage: OnDamage = _warn) -> Iterator[StoredEmbedding]:
    """The embeddings of one shard, in the order of the manifest; a row group of four in memory at a time.

    Images that failed when the store was made are left out. What was damaged since is skipped: an image, a row
    group, or all of the shard if its footer cannot be read.

    Args:
        store: Where it is.
        shard: Its number.
        on_damage: Told what is skipped; by default a warning in the log.

    Raises:
        StorageError: the shard or the manifest cannot be read from where it is stored.
        TrainingDataError: the shard is of another run.
    """
    for _, stored in _read(store, shard, 0, on_damage):
        yield stored


def _read(
    store: TeacherStore, shard: int, first_row: int, on_damage: OnDamage
) -> Iterator[tuple[int, StoredEmbedding]]:
    """With the number of each one's row in the shard."""
    listed = manifest.read_shard(store.output, shard)

    def skip(numbers: Iterable[int], reason: object) -> None:
        if image_ids := tuple(listed[number].image_id for number in numbers):
            on_damage(Damage(shard, image_ids, str(reason)))

    if damage := _damage_of_footer(store, shard):
        skip(range(first_row, len(listed)), damage)
        return
    with storage.open_input(shard_uri(store.output, "embeddings", shard)) as file:
        parquet = pq.ParquetFile(file, page_checksum_verification=True)
        if parquet.metadata.num_rows != len(listed) or not _has_schema(parquet, store):
            skip(range(first_row, len(listed)), "it has not the rows or columns that it should")
            return
        for group, numbers in _groups(parquet, first_row):
            try:
                rows = rows_of(parquet.read_row_group(group))[-len(numbers) :]
            except (pa.ArrowException, OSError) as error:
                skip(numbers, error)
                continue
            for number, row in zip(numbers, rows, strict=True):
                if fault := _fault(row, listed[number], store):
                    skip([number], fault)
                elif row["status"] == Status.OK:
                    yield number, _stored(row, listed[number])


def _damage_of_footer(store: TeacherStore, shard: int) -> str | None:
    try:
        footer, _ = read_footer(store.output, "embeddings", shard)
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        return str(error)
    if footer["fingerprint"] != store.fingerprint:
        name = storage.redact(store.output)
        raise TrainingDataError(f"shard {shard} of {name} is of another run, fingerprint {footer['fingerprint']}")
    return None


def _groups(parquet: pq.ParquetFile, first_row: int) -> Iterator[tuple[int, range]]:
    """The row groups that reach `first_row`, and the numbers of their rows from there on."""
    begin = 0
    for group in range(parquet.num_row_groups):
        end = begin + parquet.metadata.row_group(group).num_rows
        if end > first_row:
            yield group, range(max(begin, first_row), end)
        begin = end


def _has_schema(parquet: pq.ParquetFile, store: TeacherStore) -> bool:
    return parquet.schema_arrow.equals(embeddings_schema(store.image_size))


def _fault(row: Row, image: ManifestRow, store: TeacherStore) -> str | None:
    if (row["image_id"], row["uri"]) != (image.image_id, image.ref.uri):
        return f"its row is that of image {row['image_id']}"
    return embedding_fault(row, store.image_size)


def _stored(row: Row, image: ManifestRow) -> StoredEmbedding:
    return StoredEmbedding(
        image_id=image.image_id,
        uri=image.ref.uri,
        ref=image.ref,
        original_size=(row["height"], row["width"]),
        input_size=(row["input_height"], row["input_width"]),
        embedding_CGG=np.array(row["embedding"]),  # a copy, which does not keep its neighbours in memory
    )
