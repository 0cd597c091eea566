"""A masks dataset of any size as a stream of samples, for PyTorch's DataLoader and torchdata's StatefulDataLoader.

    samples = MaskSamples("s3://bucket/masks", seed=0)
    loader = DataLoader(samples, batch_size=None, num_workers=8)
    for epoch in range(epochs):
        samples.set_epoch(epoch)
        for sample in loader:
            ...

The order follows from the seed, the epoch, and how many readers there are: ranks times workers. Blocks of up to 64
neighbouring images are dealt to them; some of a reader's blocks at a time are shuffled together.
"""

import itertools
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, Literal

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from pipeline import storage
from pipeline.contents import MASKS_ROWS_PER_GROUP
from pipeline.errors import SettingsError, TrainingDataError
from pipeline.manifest import ManifestRow
from pipeline.outcomes import ahead
from pipeline.reading.order import At, dealt
from pipeline.reading.samples import (
    Form,
    Row,
    Sample,
    sample_of,
    sample_with_image,
    wanted_statuses,
    warn_of_missing,
)
from pipeline.reading.skipped import Skipped
from pipeline.reading.stored import ShardReader, stored_masks

BLOCK: Final = MASKS_ROWS_PER_GROUP
"""Images that are read together: a row group, as the commands write them."""
_WORKERS: Final = 1024  # of one DataLoader, at most
_log = logging.getLogger("everymask")

Unreadable = Literal["skip", "keep"]


class MaskSamples(IterableDataset[Sample]):
    """Streams a masks dataset, with the images read where they lay when it was made.

    Images that failed when the dataset was made are left out: they have no masks.

    `state_dict` and `load_state_dict` are what torchdata's StatefulDataLoader calls, in its workers. With
    PyTorch's own DataLoader and workers, call `set_epoch` before each pass, tell `passed` of each sample that was
    used, and keep the `state_dict` of this object. What goes on from it has every sample once, though those of
    different workers may come in another order.
    """

    def __init__(
        self,
        uri: str,
        *,
        masks: Form = "bool",
        images: bool = True,
        unreadable: Unreadable = "skip",
        with_empty: bool = False,
        seed: int | None = None,
        blocks_mixed: int = 8,
        endless: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        read_ahead: int = 4,
    ) -> None:
        """Look at a dataset; nothing but `run.json` and the shards' names is read.

        Args:
            uri: What the command that made it was given as --output.
            masks: As bool N x H x W, or as RLEs.
            images: Whether the images are read.
            unreadable: What becomes of an image that is gone or has changed: it is counted and named in the log,
                and skipped, or its sample is kept, without an image and with a `problem`.
            with_empty: Also give images in which no mask was found.
            seed: Of the order; by default it is that of the manifest.
            blocks_mixed: With a seed, blocks of 64 images that are shuffled together; they are held as RLEs.
            endless: After an epoch go on with the next one. So every rank has as many samples as it asks for; else
                some may have fewer than others.
            rank: Of this process, by default that of torch.distributed, or 0.
            world_size: How many there are.
            read_ahead: Images that each worker fetches and decodes ahead.

        Raises:
            OutputConflict, SettingsError, TrainingDataError, StorageError: as `pipeline.reading.stored_masks`.
            SettingsError: there is no such rank, or a number is below 1.
        """
        self._stored = stored_masks(uri)
        warn_of_missing(self._stored)
        if min(blocks_mixed, read_ahead) < 1:
            raise SettingsError("blocks_mixed and read_ahead must be 1 or more")
        self._form, self._images, self._unreadable = masks, images, unreadable
        self._wanted = wanted_statuses(with_empty=with_empty)
        self._seed, self._endless, self._read_ahead = seed, endless, read_ahead
        self._blocks_mixed = 1 if seed is None else blocks_mixed
        joined = torch.distributed.is_available() and torch.distributed.is_initialized()
        self._rank = (torch.distributed.get_rank() if joined else 0) if rank is None else rank
        self._ranks = (torch.distributed.get_world_size() if joined else 1) if world_size is None else world_size
        dealt(0, self._rank, self._ranks, seed=None, epoch=0)  # refuses a rank that there is not
        # In shared memory: workers may outlive an epoch, and what they skip is asked for elsewhere.
        self._epoch, self._skipped_W, self._resumes_W = _shared(1), _shared(_WORKERS), _shared(_WORKERS)
        self._behind: dict[int, At] = {}
        self._resumed: dict[int, At] = {}

    @property
    def skipped(self) -> int:
        """Images that could not be read in the pass that goes on or ended last, of all workers."""
        return int(self._skipped_W.sum())

    def set_epoch(self, epoch: int) -> None:
        """With which epoch the next pass begins. With a seed each has its own order."""
        if epoch != int(self._epoch):
            self._behind = {}
            self._resumes_W.zero_()
        self._epoch.fill_(epoch)

    def passed(self, at: At) -> None:
        """Note that a sample was used, with its `at`: where workers read, only they would know."""
        self._behind[at.worker] = at

    def state_dict(self) -> dict[str, Any]:
        """How far this rank is, as JSON."""
        return {
            "order": self._order(),
            "epoch": int(self._epoch),
            "behind": [list(at) for at in self._behind.values()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next pass go on where a state was taken.

        Raises:
            SettingsError: it is of another dataset or another order; what differs is named.
        """
        theirs, own = state["order"], self._order()
        differing = [
            f"{name} ({theirs.get(name)} there, {own[name]} here)" for name in own if theirs.get(name) != own[name]
        ]
        if differing:
            raise SettingsError(f"The state is of another order of samples: {', '.join(differing)}.")
        self.set_epoch(state["epoch"])
        self._behind = {at.worker: at for at in (At(*numbers) for numbers in state["behind"])}
        self._resumed = dict(self._behind)
        self._resumes_W[list(self._resumed)] = 1

    def __iter__(self) -> Iterator[Sample]:
        """One pass over this reader's part, or without end.

        Raises:
            StorageError, TrainingDataError: the dataset is damaged; or `endless`, and nothing of it can be read.
            SettingsError: `endless`, and there are too many readers; or the state is of other workers.
        """
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        start = self._start(worker, workers)
        self._behind = {worker: start}
        skipped, fruitless = Skipped(), 0
        self._skipped_W[worker] = 0

        def read(place: tuple[At, ManifestRow, Row]) -> Sample:
            at, listed, row = place
            if not self._images:
                return sample_of(row, self._form)._replace(at=at)
            return sample_with_image(self._stored, row, listed, self._form, skipped)._replace(at=at)

        with ThreadPoolExecutor(self._read_ahead, "samples") as pool:
            for future in ahead(pool, read, self._places(start), self._read_ahead):
                sample = future.result()
                self._skipped_W[worker] = skipped.images
                self._behind[worker] = sample.at
                if sample.problem is None or self._unreadable == "keep":
                    fruitless = 0
                    yield sample
                    continue
                fruitless += 1
                if self._endless and fruitless > self._stored.images:
                    raise TrainingDataError(
                        f"Of {self._name} no image can be read any more, lastly: {sample.problem}"
                    )
        if skipped.images:
            _log.warning(
                "%s: %d images could not be read in this pass and were left out", self._name, skipped.images
            )

    @property
    def _name(self) -> str:
        return storage.redact(self._stored.output)

    def _order(self) -> dict[str, Any]:
        """What decides the order, but for the number of workers."""
        return self._stored.identity | {
            "seed": self._seed,
            "blocks_mixed": self._blocks_mixed,
            "rank": self._rank,
            "world_size": self._ranks,
        }

    def _start(self, worker: int, workers: int) -> At:
        """Where this pass begins. A state is gone on from once."""
        resumes = {other: at for other, at in self._resumed.items() if self._resumes_W[other]}
        if any(at.workers != workers for at in resumes.values()):
            there = next(iter(resumes.values())).workers
            raise SettingsError(f"The state is of {there} processes that read, and this DataLoader has {workers}.")
        self._resumes_W[worker] = 0
        return resumes.get(worker, At(worker, workers, int(self._epoch)))

    def _places(self, start: At) -> Iterator[tuple[At, ManifestRow, Row]]:
        """Every row that is to become a sample, from a place on, with the place behind it."""
        reader = ShardReader(self._stored)
        part, parts = self._rank * start.workers + start.worker, self._ranks * start.workers
        if self._endless and parts > self._blocks:
            raise SettingsError(
                f"{self._name} has {self._blocks} blocks of {BLOCK} images, too few for {parts} readers without "
                "end. Take fewer workers."
            )
        for epoch in itertools.count(start.epoch):
            found = False
            blocks = dealt(self._blocks, part, parts, seed=self._seed, epoch=epoch)
            groups = [blocks[i : i + self._blocks_mixed] for i in range(0, len(blocks), self._blocks_mixed)]
            for group in range(start.group, len(groups)):
                rows = self._rows(reader, groups[group], epoch)
                for row in range(start.row, len(rows)):
                    if rows[row][1]["status"] in self._wanted:
                        found = True
                        yield start._replace(epoch=epoch, group=group, row=row + 1), *rows[row]
                start = start._replace(row=0)
            if not self._endless:
                return
            if not found and start.group == 0:
                raise TrainingDataError(f"{self._name} has no image with masks.")
            start = start._replace(group=0)

    @property
    def _blocks(self) -> int:
        shards = self._stored.shards
        sizes = (self._stored.images_in(shard) for shard in shards[-1:])  # only the last can be shorter
        return max(0, len(shards) - 1) * self._blocks_a_shard + sum(-(-size // BLOCK) for size in sizes)

    @property
    def _blocks_a_shard(self) -> int:
        return -(-self._stored.images_per_shard // BLOCK)

    def _rows(self, reader: ShardReader, blocks: list[int], epoch: int) -> list[tuple[ManifestRow, Row]]:
        """The rows of blocks that are shuffled together, in their order."""
        rows: list[tuple[ManifestRow, Row]] = []
        for block in blocks:
            number, within = divmod(block, self._blocks_a_shard)
            shard = self._stored.shards[number]
            first = within * BLOCK
            rows += reader.rows(shard, range(first, min(first + BLOCK, self._stored.images_in(shard))))
        if self._seed is None:
            return rows
        order = np.random.default_rng([self._seed, epoch, *blocks]).permutation(len(rows))
        return [rows[i] for i in order]


def _shared(count: int) -> torch.Tensor:
    """Zeros that all workers see."""
    zeros: torch.Tensor = torch.zeros(count, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
    return zeros
