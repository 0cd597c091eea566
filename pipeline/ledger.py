"""Who works on which shard, and what a worker is to do that has none left.

At a run's end workers are idle while others are at their last shards, and one slow or frozen machine would be
waited for by all. So an idle worker takes a shard that nobody has begun, and then repeats one that takes long,
as MapReduce's backup tasks do (Dean and Ghemawat, OSDI 2004, section 3.6). Whoever is first has made it: both
write the same rows under the same name.
"""

import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

ATTEMPTS: Final = 6
"""A shard that has killed its workers this often is given up."""
_LATE: Final = 1.5  # times the median of finished shards, and a shard in work is repeated
_REMEMBERED: Final = 999  # durations of finished shards


@dataclass
class _InWork:
    begun: float
    """When the last of its workers began it."""
    workers: dict[str, float] = field(default_factory=dict)
    """Those that have it, and when each began."""


class Ledger:
    """The shards of one Ray Dataset: which wait, which are in work, and which have killed their workers."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._waiting: dict[int, None] = {}
        self._in_work: dict[int, _InWork] = {}  # the one that was begun last is last
        self._held: dict[str, int] = {}
        self._deaths: Counter[int] = Counter()
        self.deaths = 0
        """Workers that have died of a shard, or with one."""
        self._seconds: deque[float] = deque(maxlen=_REMEMBERED)
        self._median: float | None = None

    def expect(self, shards: Iterable[int]) -> None:
        """Begin with these shards; what was left of those before is forgotten."""
        self._waiting = dict.fromkeys(shards)
        self._in_work.clear()

    @property
    def over(self) -> bool:
        """Whether each shard is made, has failed or was given up."""
        return not (self._waiting or self._in_work)

    def begin(self, shard: int, worker: str) -> int:
        """Give a shard to the worker that Ray gave it to. Which attempt at it this is, from 1.

        0 where another worker has it or had it. More than `ATTEMPTS` where it is given up.
        """
        self._bury(worker)
        attempt = self._deaths[shard] + 1
        if shard not in self._waiting:
            return attempt if attempt > ATTEMPTS else 0
        self._give(shard, worker)
        return attempt

    def spare(self, worker: str) -> int | None:
        """Give an idle worker a shard that nobody has begun, else one that takes long, else None."""
        self._bury(worker)
        shard = next(iter(self._waiting)) if self._waiting else self._late()
        if shard is not None:
            self._give(shard, worker)
        return shard

    def is_wanted(self, shard: int) -> bool:
        """Whether nobody has made the shard yet, so that whoever has it is to go on."""
        return shard in self._in_work

    def attempt(self, shard: int) -> int:
        """Which attempt at a shard in work this is, from 1."""
        return self._deaths[shard] + 1

    def give_back(self, shard: int, worker: str) -> None:
        """Let a shard wait again that a worker leaves for reasons of its own, unless another one has it."""
        if self._held.get(worker) != shard:
            return
        del self._held[worker]
        work = self._in_work.get(shard)
        if work is not None:
            work.workers.pop(worker, None)
            if not work.workers:
                del self._in_work[shard]
                self._waiting = {shard: None} | self._waiting

    def end(self, shard: int, worker: str, *, made: bool) -> bool:
        """Take a shard back from a worker that made it, or could not. Whether nobody will have made it."""
        if self._held.get(worker) == shard:
            del self._held[worker]
        work = self._in_work.get(shard)
        if work is None:
            return False
        begun = work.workers.pop(worker, None)  # None where its machine was thought dead and came back
        if made and begun is not None:
            self._seconds.append(self._clock() - begun)
            self._median = None
        if not made and work.workers:
            return False
        del self._in_work[shard]
        del self._deaths[shard]
        return not made

    def _give(self, shard: int, worker: str) -> None:
        self._waiting.pop(shard, None)
        work = self._in_work.pop(shard, None) or _InWork(0.0)
        work.begun = work.workers[worker] = self._clock()
        self._in_work[shard] = work
        self._held[worker] = shard

    def _bury(self, worker: str) -> None:
        """A worker that asks for another shard without having ended its own died of that, and is new."""
        shard = self._held.pop(worker, None)
        work = self._in_work.get(shard) if shard is not None else None
        if shard is None or work is None:
            return
        self._deaths[shard] += 1
        self.deaths += 1
        del work.workers[worker]
        if not work.workers:
            del self._in_work[shard]
            if self._deaths[shard] < ATTEMPTS:
                self._waiting = {shard: None} | self._waiting

    def _late(self) -> int | None:
        """The shard in work that is to be repeated: begun longest ago, and later the more have it already."""
        if not self._seconds:
            return None
        if self._median is None:
            self._median = statistics.median(self._seconds)
        now = self._clock()
        for shard, work in self._in_work.items():
            waited = now - work.begun
            if waited < _LATE * self._median:
                return None  # all others were begun later
            if waited >= _LATE * self._median * len(work.workers):
                return shard
        return None
