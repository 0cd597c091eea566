"""A teacher store as batches: each picture is read again from where it lies, its target from the store.

A batch follows from its number, the worker's and how many workers there are, so a training that is killed goes on
with the batches it would have had, and nothing about the reading belongs into a checkpoint.

The order is the seed's. An epoch is a permutation of the shards, dealt out to the workers; of a worker's shards,
some at a time are shuffled together. All workers make the same number of steps: whoever has fewer pictures than
others begins again with his first, whoever has more leaves his last out, in each epoch others.
"""

import bisect
import itertools
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline import manifest, sources, storage
from pipeline.errors import ImageError, SettingsError, TrainingDataError
from pipeline.images import decode_image
from pipeline.model.sam import resized
from pipeline.reading.skipped import Skipped
from pipeline.training.decoupled import Lessons
from pipeline.training.store import StoredEmbedding, TeacherStore, read_shard, shards_of
from schemas.masks import Status

ShardsOfEpoch = Callable[[int], Sequence[int]]
"""The shards that a worker reads in an epoch, in their order; asked for ascending epochs."""

_PATIENCE: Final = 100  # pictures that fail one after another before it is the storage that fails


@dataclass(frozen=True, kw_only=True)
class Order:
    """In which order a store is gone through, and in what portions."""

    store: TeacherStore
    images_per_shard: int
    """Of every shard but the last, which has the rest."""
    batch_size: int
    """Of all workers together."""
    workers: int
    shards_mixed: int
    seed: int

    @classmethod
    def of(cls, store: TeacherStore, *, batch_size: int, workers: int, shards_mixed: int, seed: int) -> "Order":
        """For a store, whose manifest is looked at.

        Raises:
            SettingsError: there are more workers than shards.
            StorageError: the manifest cannot be read.
            TrainingDataError: the store is empty.
        """
        if not store.images:
            raise TrainingDataError(f"{storage.redact(store.output)} holds no images.")
        if workers > store.shards:
            raise SettingsError(
                f"The store has {store.shards} shards, too few for {workers} workers. Take fewer, or make the "
                "store anew with a smaller --images-per-shard."
            )
        first = manifest.read_shard(store.output, 0)
        return cls(
            store=store,
            images_per_shard=len(first),
            batch_size=batch_size,
            workers=workers,
            shards_mixed=shards_mixed,
            seed=seed,
        )

    @property
    def share(self) -> int:
        """Pictures of a batch that are one worker's."""
        return self.batch_size // self.workers

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in the store. Images that failed when it was made count as if they were there."""
        return max(1, self.store.images // self.batch_size)

    def shards(self, rank: int, epoch: int) -> list[int]:
        """Those that a worker reads in an epoch."""
        return shards_of(self.store, rank, self.workers, seed=self.seed, epoch=epoch)

    def images_in(self, shard: int) -> range:
        """The numbers of a shard's images."""
        begin = shard * self.images_per_shard
        return range(begin, min(begin + self.images_per_shard, self.store.images))


class Picture(NamedTuple):
    """One picture, and what the teacher makes of it."""

    name: str
    pixels_3SS: torch.Tensor
    input_size: tuple[int, int]
    target_CGG: torch.Tensor


class Failure(NamedTuple):
    """Why a picture of the store cannot be read now."""

    reason: str


class LessonReader:
    """Reads one worker's part of every batch."""

    def __init__(self, order: Order, rank: int, *, read_ahead: int, shards: ShardsOfEpoch | None = None) -> None:
        """Take an order; nothing is read yet.

        Args:
            order: In which the store is gone through.
            rank: Of this worker.
            read_ahead: Pictures that are fetched and decoded before they are asked for.
            shards: Where the shards of an epoch are told by someone else than `order`.
        """
        self._order, self._read_ahead = order, read_ahead
        self._shards: ShardsOfEpoch = shards or (lambda epoch: order.shards(rank, epoch))
        self.skipped = Skipped()

    def batches(self, first: int) -> Generator[Lessons]:
        """The batches from a number on, without end. Close the generator to end its threads.

        In place of a picture that is not there or cannot be read stands the next one that can.

        Raises:
            StorageError: the store cannot be read.
            TrainingDataError: 100 pictures one after another cannot be read, or none is there at all.
        """
        share = self._order.share
        with _Rows(self._order, self._shards, self._read_ahead, self.skipped) as rows:
            for number in itertools.count(first):
                yield _stacked(rows.readable(number * share, share))


class _Rows:
    """The endless row of a worker's pictures, by their place in it, read ahead in threads."""

    def __init__(self, order: Order, shards: ShardsOfEpoch, read_ahead: int, skipped: Skipped) -> None:
        self._order, self._shards, self._read_ahead, self._skipped = order, shards, read_ahead, skipped
        self._epochs: dict[int, _Epoch] = {}
        self._groups: dict[tuple[int, int], Future[dict[int, StoredEmbedding]]] = {}
        self._pending: dict[int, Future[Picture | Failure | None]] = {}
        self._store_reader = ThreadPoolExecutor(1, "store")
        self._picture_readers = ThreadPoolExecutor(read_ahead, "pictures")

    def __enter__(self) -> "_Rows":
        return self

    def __exit__(self, *_: object) -> None:
        self._store_reader.shutdown(wait=False, cancel_futures=True)
        self._picture_readers.shutdown(cancel_futures=True)

    def readable(self, begin: int, count: int) -> list[Picture]:
        """The first pictures from a place on that can be read."""
        found: list[Picture] = []
        failures = 0
        for place in itertools.count(begin):
            for ahead in range(place, max(place + 1, begin + count + self._read_ahead)):
                if ahead not in self._pending:
                    self._pending[ahead] = self._begin(ahead)
            match self._pending[place].result():
                case Picture() as picture:
                    found.append(picture)
                    failures = 0
                case Failure(reason):
                    failures += 1
                    if failures == _PATIENCE:
                        raise TrainingDataError(f"{failures} pictures failed one after another, lastly: {reason}")
                case None if place - begin > 2 * self._order.store.images:
                    name = storage.redact(self._order.store.output)
                    raise TrainingDataError(f"There is no picture in {name} to learn from.")
            if len(found) == count:
                break
        for old in [place for place in self._pending if place < begin + count]:
            del self._pending[old]
        return found

    def _begin(self, place: int) -> "Future[Picture | Failure | None]":
        epoch, within = divmod(place, self._order.steps_per_epoch * self._order.share)
        group, image_id = self._epoch(epoch).at(within)
        stored = self._group(epoch, group)
        return self._picture_readers.submit(self._read, stored, image_id)

    def _epoch(self, number: int) -> "_Epoch":
        if number not in self._epochs:
            kept = {known: epoch for known, epoch in self._epochs.items() if known >= number - 1}
            self._epochs = kept | {number: _Epoch(self._order, number, self._shards(number))}
        return self._epochs[number]

    def _group(self, epoch: int, group: int) -> Future[dict[int, StoredEmbedding]]:
        """What the store holds of a group. The one after it is read meanwhile; older ones are let go."""
        here = (epoch, group)
        following = (epoch, group + 1) if group + 1 < len(self._epoch(epoch).groups) else (epoch + 1, 0)
        kept = {key: self._groups[key] for key in (here, following) if key in self._groups}
        for key in (here, following):
            if key not in kept:
                shards = self._epoch(key[0]).groups[key[1]]
                kept[key] = self._store_reader.submit(self._read_group, shards)
        self._groups = kept
        return kept[here]

    def _read_group(self, shards: Sequence[int]) -> dict[int, StoredEmbedding]:
        return {
            stored.image_id: stored
            for shard in shards
            for stored in read_shard(self._order.store, shard, on_damage=self._skipped.damage)
        }

    def _read(self, group: Future[dict[int, StoredEmbedding]], image_id: int) -> Picture | Failure | None:
        stored = group.result().get(image_id)
        if stored is None:
            return None
        try:
            return _picture(stored, self._order.store)
        except ImageError as error:
            self._skipped.failure(stored.image_id, error)
            return Failure(str(error))


class _Epoch:
    """The order of one worker's pictures in one epoch."""

    def __init__(self, order: Order, number: int, shards: Sequence[int]) -> None:
        mixed = order.shards_mixed
        self.groups = [tuple(shards[i : i + mixed]) for i in range(0, len(shards), mixed)]
        sizes = [sum(len(order.images_in(shard)) for shard in group) for group in self.groups]
        self._ends = list(itertools.accumulate(sizes))
        self._order, self._number = order, number
        self._shuffled: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))

    def at(self, place: int) -> tuple[int, int]:
        """The group at a place, and the number of the image there. Behind the last place the first follows."""
        place %= self._ends[-1]
        group = bisect.bisect_right(self._ends, place)
        return group, int(self._images(group)[place - self._ends[group]])

    def _images(self, group: int) -> NDArray[np.int64]:
        """The shuffled numbers of a group's images; of the last group that was asked for they are kept."""
        if self._shuffled[0] != group:
            shards = self.groups[group]
            images = np.concatenate([self._order.images_in(shard) for shard in shards]).astype(np.int64)
            rng = np.random.default_rng([self._order.seed, self._number, *shards])
            self._shuffled = (group, rng.permutation(images))
        return self._shuffled[1]


def _picture(stored: StoredEmbedding, store: TeacherStore) -> Picture:
    """Fetch, decode and resize one picture as the encoder sees it.

    Raises:
        ImageError: it cannot be read, or is not the one that the teacher saw.
    """
    rgb_HW3 = decode_image(sources.fetch(stored.ref, max_bytes=store.max_bytes), max_pixels=store.max_pixels)
    if rgb_HW3.shape[:2] != stored.original_size:
        raise ImageError(
            Status.CHANGED,
            f"{storage.redact(stored.uri)}: {rgb_HW3.shape[:2]} pixels, the teacher saw {stored.original_size}",
        )
    small_HW3 = resized(rgb_HW3, store.image_size)
    height, width = small_HW3.shape[:2]
    pixels = np.zeros((3, store.image_size, store.image_size), np.uint8)
    pixels[:, :height, :width] = small_HW3.transpose(2, 0, 1)
    return Picture(
        f"image {stored.image_id}",
        torch.from_numpy(pixels),
        (height, width),
        torch.from_numpy(stored.embedding_CGG),
    )


def _stacked(pictures: list[Picture]) -> Lessons:
    return Lessons(
        tuple(picture.name for picture in pictures),
        torch.stack([picture.pixels_3SS for picture in pictures]),
        torch.tensor([picture.input_size for picture in pictures]),
        torch.stack([picture.target_CGG for picture in pictures]),
    )
