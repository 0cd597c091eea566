"""A run of many workers as events in simulated time: who has which shard, what is lost, what is waited for.

A shard's time comes from a recurrence over its images, which follows `pipeline.outcomes`: threads that read
ahead, two decodings ahead, one device. The cluster draws shards of these times and follows
`pipeline.engine`: Datasets of 10,000 shards, two calls a worker, and the engine's own `Ledger` in simulated time.
"""

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from pipeline.ledger import ATTEMPTS, Ledger

SHARDS_AT_ONCE: Final = 10_000
IN_FLIGHT: Final = 2
DECODED_AHEAD: Final = 2
FREEZES_AT: Final = 3
"""The shard of a frozen worker, counted from 1, that it never ends."""
_POLL_SECONDS: Final = 1.0
_SPARE: Final = -1
_SAMPLES: Final = 200
"""Shards whose images are followed one by one; the cluster's shards are drawn from them."""


@dataclass(frozen=True)
class Measured:
    """What a worker takes, in seconds, of a sample of images and for each shard."""

    fetch: list[float]
    decode: list[float]
    make: list[float]
    """Encoding, decoding of masks, post-processing: the device's part. Of the same images as the others."""
    plan: float
    """To read a shard's rows of the manifest."""
    write: float
    """From a shard's last image to its file."""
    image_bytes: float = 0.0
    """Of an image's file, on average."""

    def scaled(self, image_seconds: float) -> "Measured":
        """As if a device took so long for an image on average, with the same spread."""
        factor = image_seconds * len(self.make) / sum(self.make)
        return Measured(
            self.fetch, self.decode, [s * factor for s in self.make], self.plan, self.write, self.image_bytes
        )


@dataclass(frozen=True)
class Store:
    """An object store."""

    latency: float = 0.0
    """Seconds that a request takes besides what was measured."""
    requests_per_second: float = math.inf
    """Reads that it answers, of all workers together."""
    bytes_per_second: float = math.inf
    """That it sends, to all workers together."""

    def gap(self, workers: int, image_bytes: float) -> float:
        """Seconds between the starts of two reads of one worker, where all read as fast as they may."""
        return workers * max(1 / self.requests_per_second, image_bytes / self.bytes_per_second)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A run's size, its machines, and what goes wrong."""

    images: int
    workers: int
    images_per_shard: int = 256
    read_ahead: int = 8
    store: Store = Store()
    driver_seconds: float = 0.0
    """Before workers are asked for."""
    startup_seconds: float = 0.0
    """Until a worker has its model, of each Dataset and after each reclaim."""
    block_seconds: float = 0.0025
    """Of the driver for each shard of a Dataset before its first begins (docs/architecture.md)."""
    reclaims_per_hour: float = 0.0
    """Of each machine."""
    replacement_seconds: float = 120.0
    """Until there is another machine."""
    slow: Mapping[int, float] = field(default_factory=dict)
    """Worker -> how many times as long it takes; infinite: it freezes in its third shard."""
    large: Mapping[int, float] = field(default_factory=dict)
    """Shard -> how many times as long it takes."""
    repeats: bool = True
    """Whether idle workers help, as the engine's do."""
    largest_first: bool = True
    seed: int = 0

    @property
    def shards(self) -> int:
        """Of the run."""
        return -(-self.images // self.images_per_shard)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a simulated run took."""

    seconds: float
    """From the driver's start to the last shard; infinite where a frozen worker is waited for."""
    first_seconds: float
    """From the driver's start to the first shard."""
    worker_seconds: float
    """That machines were there, working or not."""
    device_seconds: float
    """That images took on devices, each once: what an ideal run would take."""
    lost_seconds: float
    """Of workers, on shards that a reclaim cut off."""
    repeated_seconds: float
    """Of workers, on shards that another made first."""
    images: int
    made: Mapping[int, int]
    """How many shards were made so many times; {1: all} where none was missed or counted twice."""
    reads: int
    writes: int

    @property
    def images_per_second(self) -> float:
        """Of all workers."""
        return self.images / self.seconds

    @property
    def efficiency(self) -> float:
        """The devices' time for images against the time that was there."""
        return self.device_seconds / self.worker_seconds

    @property
    def wasted(self) -> float:
        """Share of the time that went into work which was thrown away."""
        return (self.lost_seconds + self.repeated_seconds) / self.worker_seconds


def shard_seconds(
    measured: Measured, images: int, read_ahead: int, store: Store, *, workers: int, order: random.Random
) -> tuple[float, float]:
    """One shard of images drawn from the measured ones: its time, and the device's part of it."""
    gap = store.gap(workers, measured.image_bytes)
    drawn = [order.randrange(len(measured.make)) for _ in range(images)]
    fetchers, decoders = [0.0] * read_ahead, [0.0] * DECODED_AHEAD
    asked: list[float] = []  # when the device could take image i
    decoded: list[float] = []
    next_read = now = measured.plan + 3 * store.latency
    device = 0.0

    def submit(index: int, at: float) -> None:
        nonlocal next_read
        image = drawn[index]
        begun = max(at, heapq.heappop(fetchers), next_read)
        next_read = begun + gap
        fetched = begun + store.latency + measured.fetch[image]
        heapq.heappush(fetchers, fetched)
        decoded.append(fetched)

    for index, image in enumerate(drawn):
        asked.append(now)
        while len(decoded) < min(images, index + DECODED_AHEAD + read_ahead + 1):
            submit(len(decoded), now)
        if index == 0:
            for first in range(min(images, DECODED_AHEAD)):
                decoded[first] = _decode(decoders, decoded[first], now, measured.decode[drawn[first]])
        if index + DECODED_AHEAD < images:
            later = index + DECODED_AHEAD
            decoded[later] = _decode(decoders, decoded[later], now, measured.decode[drawn[later]])
        now = max(now, decoded[index]) + measured.make[image]
        device += measured.make[image]
    return now + measured.write + store.latency, device


def _decode(decoders: list[float], fetched: float, asked: float, seconds: float) -> float:
    end = max(asked, fetched, heapq.heappop(decoders)) + seconds
    heapq.heappush(decoders, end)
    return end


@dataclass
class _Worker:
    up: bool = False
    since: float = 0.0
    """When its machine came."""
    life: int = 0
    """Raised by each end of what it does, so that events of before mean nothing."""
    calls: deque[int] = field(default_factory=deque)
    shard: int | None = None
    begun: float = 0.0


def simulate(cluster: Cluster, measured: Measured, datasets: int = 20) -> Outcome:
    """Simulate a run; of a long one so many Datasets, as which the others go on.

    Args:
        cluster: The run.
        measured: What its workers take.
        datasets: Of 10,000 shards each.
    """
    most = datasets * SHARDS_AT_ONCE * cluster.images_per_shard
    if cluster.images <= most:
        return _Simulation(cluster, measured).run()
    part = _Simulation(replace(cluster, images=most), measured).run()
    factor = cluster.images / most
    return Outcome(
        seconds=part.seconds * factor,
        first_seconds=part.first_seconds,
        worker_seconds=part.worker_seconds * factor,
        device_seconds=part.device_seconds * factor,
        lost_seconds=part.lost_seconds * factor,
        repeated_seconds=part.repeated_seconds * factor,
        images=cluster.images,
        made=part.made,
        reads=round(part.reads * factor),
        writes=round(part.writes * factor),
    )


class _Simulation:
    """The Datasets of a run, one after another."""

    def __init__(self, cluster: Cluster, measured: Measured) -> None:
        self.cluster = cluster
        self.order = random.Random(cluster.seed)
        self.now = cluster.driver_seconds
        self.events: list[tuple[float, int, str, int, int]] = []
        self.number = itertools.count()
        self.workers = [_Worker(since=self.now) for _ in range(min(cluster.workers, cluster.shards))]
        self.samples = [
            shard_seconds(
                measured,
                min(cluster.images_per_shard, cluster.images),
                cluster.read_ahead,
                cluster.store,
                workers=len(self.workers),
                order=self.order,
            )
            for _ in range(_SAMPLES)
        ]
        self.ledger = Ledger(lambda: self.now)
        self.calls: deque[int] = deque()
        self.idle: set[int] = set()
        self.begun = [0] * len(self.workers)
        self.drawn: dict[int, tuple[float, float]] = {}
        self.having: dict[int, set[int]] = {}
        self.made: dict[int, int] = {}
        self.device = self.lost = self.repeated = self.alive = 0.0
        self.attempts = 0
        self.first = math.inf

    def run(self) -> Outcome:
        cluster = self.cluster
        for worker in range(len(self.workers)):
            self._live(worker)
        for start in range(0, cluster.shards, SHARDS_AT_ONCE):
            self._dataset(list(range(start, min(start + SHARDS_AT_ONCE, cluster.shards))))
        self.alive += sum(max(0.0, self.now - worker.since) for worker in self.workers)
        counts: dict[int, int] = {}
        for times in self.made.values():
            counts[times] = counts.get(times, 0) + 1
        return Outcome(
            seconds=self.now,
            first_seconds=self.first,
            worker_seconds=self.alive,
            device_seconds=self.device,
            lost_seconds=self.lost,
            repeated_seconds=self.repeated,
            images=cluster.images,
            made=counts,
            reads=cluster.images + 3 * self.attempts,
            writes=len(self.made),
        )

    def _dataset(self, shards: list[int]) -> None:
        cluster = self.cluster
        self.ledger.expect(shards)
        large = [shard for shard in shards if cluster.large.get(shard, 1) > 2] if cluster.largest_first else []
        large.sort(key=lambda shard: -cluster.large[shard])
        spares = len(self.workers) * IN_FLIGHT if cluster.repeats and len(self.workers) > 1 else 0
        self.calls = deque([*large, *(shard for shard in shards if shard not in large), *[_SPARE] * spares])
        begin = self.now + cluster.block_seconds * len(self.calls)
        for name, worker in enumerate(self.workers):
            worker.calls.clear()
            worker.shard, worker.up = None, False
            worker.life += 1
            self._at(max(begin, worker.since) + cluster.startup_seconds, "start", name)
        while not self.ledger.over and self.events:
            self.now, _, kind, name, life = heapq.heappop(self.events)
            if kind == "reclaim":
                self._reclaim(name)
            elif kind == "poll":
                self._poll()
            elif life == self.workers[name].life:
                if kind == "start":
                    self.workers[name].up = True
                    self._next(name)
                else:
                    self._end(name)
        if not self.ledger.over:
            self.now = math.inf
        self.idle.clear()

    def _at(self, when: float, kind: str, name: int) -> None:
        if when < math.inf:
            heapq.heappush(self.events, (when, next(self.number), kind, name, self.workers[name].life))

    def _live(self, name: int) -> None:
        """A machine comes; when it will be taken away is drawn."""
        if self.cluster.reclaims_per_hour:
            hours = self.order.expovariate(self.cluster.reclaims_per_hour)
            self._at(self.workers[name].since + 3600 * hours, "reclaim", name)

    def _reclaim(self, name: int) -> None:
        worker = self.workers[name]
        self.alive += self.now - worker.since
        if worker.shard is not None:
            self.lost += self.now - worker.begun
            self.having.get(worker.shard, set()).discard(name)
        worker.up, worker.shard = False, None
        worker.life += 1
        worker.since = self.now + self.cluster.replacement_seconds
        self.idle.discard(name)
        self._live(name)
        self._at(worker.since + self.cluster.startup_seconds, "start", name)

    def _next(self, name: int) -> None:
        """A worker is free: its next call. Ray Data fills up to two, the emptiest worker's first."""
        worker = self.workers[name]
        while True:
            while self.calls and len(worker.calls) < IN_FLIGHT:
                worker.calls.append(self.calls.popleft())
            if not worker.calls:
                return
            call = worker.calls[0]
            if call == _SPARE:
                self._spare(name)
                return
            if 0 < self.ledger.begin(call, str(name)) <= ATTEMPTS:
                self._begin(name, call)
                return
            worker.calls.popleft()

    def _spare(self, name: int) -> None:
        shard = self.ledger.spare(str(name))
        if shard is not None:
            self.idle.discard(name)
            self._begin(name, shard)
        elif not self.ledger.over:
            if not self.idle:
                self._at(self.now + _POLL_SECONDS, "poll", 0)
            self.idle.add(name)

    def _poll(self) -> None:
        waiting = sorted(self.idle)
        self.idle.clear()
        for name in waiting:
            self._spare(name)

    def _begin(self, name: int, shard: int) -> None:
        worker, cluster = self.workers[name], self.cluster
        seconds, _ = self.drawn.setdefault(shard, self.order.choice(self.samples))
        factor = cluster.slow.get(name, 1.0)
        self.begun[name] += 1
        if factor == math.inf and self.begun[name] < FREEZES_AT:
            factor = 1.0
        self.attempts += 1
        self.having.setdefault(shard, set()).add(name)
        worker.shard, worker.begun = shard, self.now
        worker.life += 1
        self._at(self.now + seconds * factor * cluster.large.get(shard, 1.0), "end", name)

    def _end(self, name: int) -> None:
        worker = self.workers[name]
        shard = worker.shard
        assert shard is not None
        if first := self.ledger.is_wanted(shard):
            self.first = min(self.first, self.now)
            self.made[shard] = self.made.get(shard, 0) + 1
            self.device += self.drawn.pop(shard)[1] * self.cluster.large.get(shard, 1.0)
            self._overtake(self.having.pop(shard) - {name})
        else:
            self.repeated += self.now - worker.begun
        self.ledger.end(shard, str(name), made=first)
        worker.shard = None
        if first or worker.calls[0] != _SPARE:
            worker.calls.popleft()
        self._next(name)

    def _overtake(self, others: set[int]) -> None:
        """Those that have the same shard hear of it with their next report; a frozen one never."""
        for name in sorted(others):
            if self.cluster.slow.get(name) != math.inf:
                self.workers[name].life += 1
                self._at(self.now + _POLL_SECONDS, "end", name)
