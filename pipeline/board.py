"""The board: where workers post how far their shards are, and which outlives them.

A plain class, which `pipeline.engine` makes an actor of. It is on the driver's node.
"""

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple

from pipeline.ledger import ATTEMPTS, Ledger
from schemas.progress import FailedShard, ImageInWork, SlowImage

SLOWEST: Final = 10
"""Images that are remembered as the slowest."""


class Post(NamedTuple):
    """What a worker posts of the shard it makes, once a second."""

    worker: str
    shard: int
    images: int
    """Done so far."""
    masks: int
    failures: dict[str, int]
    """Failed images by status."""
    image: ImageInWork | None
    slow: list[SlowImage]
    """Done since the last post, if they may be among the slowest: at most `SLOWEST`."""


@dataclass(frozen=True)
class AtWork:
    """A shard in work, as the board knows it."""

    attempt: int
    seconds: float
    """Since this attempt began."""
    silent_seconds: float
    """Since its worker was heard of."""
    post: Post
    """The last one, with its image's seconds counted on."""
    died_at: ImageInWork | None
    """What the worker of the attempt before had at hand, as far as it said."""


@dataclass(frozen=True)
class Work:
    """All that the board knows, at one time."""

    at_work: tuple[AtWork, ...] = ()
    died: int = 0
    failed_shards: tuple[FailedShard, ...] = ()
    slowest: tuple[SlowImage, ...] = ()

    @property
    def images(self) -> int:
        """Done, of the shards in work."""
        return sum(post.images for post in self._farthest())

    @property
    def masks(self) -> int:
        """Of the shards in work."""
        return sum(post.masks for post in self._farthest())

    @property
    def failures(self) -> Counter[str]:
        """Failed images of the shards in work, by status."""
        total: Counter[str] = Counter()
        for post in self._farthest():
            total.update(post.failures)
        return total

    def _farthest(self) -> Iterable[Post]:
        """Of each shard; several workers may be at one."""
        return {one.post.shard: one.post for one in sorted(self.at_work, key=lambda one: one.post.images)}.values()


class Spare(NamedTuple):
    """What an idle worker gets: a shard if there is one now, which attempt at it this is, whether all are over."""

    shard: int | None
    attempt: int
    over: bool


class _Attempt:
    """One worker's at a shard, by the board's clock."""

    def __init__(self, number: int, worker: str, shard: int, died_at: ImageInWork | None) -> None:
        self.begun = self.heard = time.monotonic()
        self.number = number
        self.post = Post(worker, shard, 0, 0, {}, None, [])
        self.died_at = died_at


class Board:
    """What is in work and where, how often each shard was begun, and whether files may still be written.

    Workers are called by names, which they keep when they are started anew.
    """

    def __init__(self) -> None:
        self._ledger = Ledger()
        self._working: dict[str, _Attempt] = {}
        self._writing: set[str] = set()
        self._slowest: dict[int, SlowImage] = {}
        self._failed: dict[int, str] = {}
        self._closed = False

    def expect(self, shards: list[int]) -> None:
        """Begin with these shards; those before them are over."""
        self._ledger.expect(shards)
        self._working.clear()

    def begin(self, shard: int, worker: str) -> int:
        """Which attempt at the shard this is, from 1. Beyond `ATTEMPTS` it is not to be made.

        0 where another worker has it or had it.
        """
        attempt = self._ledger.begin(shard, worker)
        self._given(shard if 0 < attempt <= ATTEMPTS else None, attempt, worker)
        if attempt > ATTEMPTS:
            self._failed[shard] = f"it has killed its worker {ATTEMPTS} times"
        return attempt

    def spare(self, worker: str) -> Spare:
        """A shard for an idle worker."""
        shard = self._ledger.spare(worker)
        attempt = self._ledger.attempt(shard) if shard is not None else 0
        self._given(shard, attempt, worker)
        return Spare(shard, attempt, self._ledger.over)

    def _given(self, shard: int | None, attempt: int, worker: str) -> None:
        self._writing.discard(worker)
        before = self._working.pop(worker, None)
        if shard is not None:
            died_at = before.post.image if before is not None and before.post.shard == shard else None
            self._working[worker] = _Attempt(attempt, worker, shard, died_at)

    def report(self, post: Post) -> bool:
        """Take a worker's post. Whether its shard is still wanted; if not, only its slow images count."""
        attempt = self._working.get(post.worker)
        if attempt is not None and attempt.post.shard == post.shard:
            attempt.post, attempt.heard = post._replace(slow=[]), time.monotonic()
        for image in post.slow:
            if (known := self._slowest.get(image["image_id"])) is None or known["seconds"] < image["seconds"]:
                self._slowest[image["image_id"]] = image
        slowest = sorted(self._slowest.values(), key=lambda image: image["seconds"], reverse=True)[:SLOWEST]
        self._slowest = {image["image_id"]: image for image in slowest}
        return self._ledger.is_wanted(post.shard)

    def may_write(self, worker: str) -> bool:
        """Whether the run goes on, so that the worker may write its shard's file."""
        if not self._closed:
            self._writing.add(worker)
        return not self._closed

    def close(self) -> bool:
        """Let no file be written any more. Whether none is being written."""
        self._closed = True
        return not self._writing

    def made(self, shard: int, worker: str) -> None:
        """The shard has its file."""
        self._let_go(worker)
        self._ledger.end(shard, worker, made=True)

    def failed(self, shard: int, worker: str, error: str) -> None:
        """The worker could not make the shard. If it is left without a file, that is worth a word."""
        self._let_go(worker)
        if self._ledger.end(shard, worker, made=False) and not self._closed:
            self._failed[shard] = error

    def give_back(self, shard: int, worker: str) -> None:
        """Undo `begin` or `spare`: the worker was told to go, which is not the shard's doing."""
        self._let_go(worker)
        self._ledger.give_back(shard, worker)

    def _let_go(self, worker: str) -> None:
        self._working.pop(worker, None)
        self._writing.discard(worker)

    def over(self) -> bool:
        """Whether every shard was made, has failed or is given up."""
        return self._ledger.over

    def read(self) -> Work:
        """All that is known now."""
        now = time.monotonic()
        failed = tuple(FailedShard(shard=shard, error=error) for shard, error in self._failed.items())
        return Work(
            tuple(_at_work(one, now) for one in self._working.values() if self._ledger.is_wanted(one.post.shard)),
            self._ledger.deaths,
            failed,
            tuple(self._slowest.values()),
        )


def _at_work(attempt: _Attempt, now: float) -> AtWork:
    silent = now - attempt.heard
    post = attempt.post
    if post.image is not None:
        image: ImageInWork = {**post.image, "seconds": post.image["seconds"] + silent}
        post = post._replace(image=image)
    return AtWork(attempt.number, now - attempt.begun, silent, post, attempt.died_at)
