"""What Ray exports of a run for Prometheus, and where a worker's events go.

Each process records here, and its node's agent exports: nothing is sent by us, and nothing waits. docs/metrics.md
says what each metric means. Totals count an image again where a shard is repeated; those of a dataset are in its
summary.json.
"""

import logging
import time
from collections import Counter as Counts
from collections import defaultdict
from pathlib import Path
from typing import Any, Final

import ray
from ray.util.metrics import Counter, Gauge, Histogram

from pipeline.phases import ON_DEVICE, Phase
from pipeline.shard import ImageDone

_SECONDS_BETWEEN: Final = 1.0
_IDLE_SECONDS: Final = 10.0  # that the idle fraction is of: a shard's end is no picture of the whole
_BOUNDARIES: Final = [0.001 * 2**step for step in range(18)]  # 1 ms to 131 s
_WORKER: Final = ("run", "worker")
_log = logging.getLogger("everymask")


def worker_name() -> str:
    """This actor's, as short as it can be told from others: the start of the id that Ray's dashboard shows."""
    return str(ray.get_runtime_context().get_actor_id())[:12]


def logs_folder() -> Path:
    """Of this node's Ray session: what lies there, Ray's dashboard shows."""
    node: Any = ray._private.worker.global_worker.node
    return Path(node.get_logs_dir_path())


def say_if_not_exported() -> None:
    """Log that no node exports metrics, where that is so. The run goes on without."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    if not any(node["MetricsExportPort"] > 0 for node in nodes if node["Alive"]):
        _log.warning("Ray exports no metrics here. The run goes on without them; progress is in this log.")


class WorkerMetrics:
    """What one worker does, recorded at most once a second and when a shard is finished."""

    def __init__(self, run: str, worker: str) -> None:
        """Name the run and the worker, which are tags of each metric."""
        tags = {"run": run, "worker": worker}

        def counter(name: str, description: str, *more: str) -> Counter:
            metric = Counter(f"everymask_{name}", description, (*_WORKER, *more))
            metric.set_default_tags(tags)
            return metric

        def gauge(name: str, description: str) -> Gauge:
            metric = Gauge(f"everymask_{name}", description, _WORKER)
            metric.set_default_tags(tags)
            return metric

        self._images = counter("images", "Images that have a row, the failed ones too.")
        self._masks = counter("masks", "Masks in these rows.")
        self._bytes = counter("bytes_read", "Bytes of image files fetched.")
        self._failures = counter("failures", "Images that failed, by reason: the row's status.", "reason")
        self._total = counter("phase_seconds", "Seconds in a phase, summed over threads.", "phase")
        self._each = Histogram(
            "everymask_image_phase_seconds",
            "Seconds an image was in a phase; in the phase write, a shard.",
            _BOUNDARIES,
            (*_WORKER, "phase"),
        )
        self._each.set_default_tags(tags)
        self._idle = gauge("device_idle_fraction", "Share of the worker's time without an image on the device.")
        self._in_flight = gauge("images_in_flight", "Images begun that have no row yet.")
        self._fetched = gauge("images_fetched_ahead", "Images that are fetched and wait to be decoded.")
        self._decoded = gauge("images_decoded_ahead", "Images that are decoded and wait for the device.")
        self._in_flight.set(0)  # so that the worker is there from its start
        self._done: list[ImageDone] = []
        self._written: list[float] = []
        self._recorded = self._idle_since = time.monotonic()
        self._busy, self._idle_seconds = 0.0, _SECONDS_BETWEEN  # the first time early

    def image_done(self, image: ImageDone) -> None:
        """Take note of an image."""
        self._done.append(image)
        if time.monotonic() - self._recorded >= _SECONDS_BETWEEN:
            self.record()

    def shard_written(self, seconds: float) -> None:
        """Take note of a shard's file, and of how long writing it took, and record all."""
        self._written.append(seconds)
        self.record()

    def record(self) -> None:
        """Record what was taken note of since the last time. Cheap: nothing leaves this process here."""
        taken = [item for image in self._done for item in image.seconds.items()]
        taken += [("write", seconds) for seconds in self._written]
        totals: defaultdict[Phase, float] = defaultdict(float)
        for phase, seconds in taken:
            totals[phase] += seconds
            self._each.observe(seconds, {"phase": phase})
        for phase, total in totals.items():
            if total > 0:
                self._total.inc(total, {"phase": phase})
        for reason, count in Counts(image.status for image in self._done if image.failed).items():
            self._failures.inc(count, {"reason": reason})
        readings = [image.reading for image in self._done if image.reading is not None]
        for metric, amount in (
            (self._images, len(self._done)),
            (self._masks, sum(image.masks for image in self._done)),
            (self._bytes, sum(reading.bytes for reading in readings)),
        ):
            if amount:
                metric.inc(amount)
        if readings:
            self._in_flight.set(readings[-1].in_flight)
            self._fetched.set(readings[-1].fetched)
            self._decoded.set(readings[-1].decoded)
        self._done, self._written, self._recorded = [], [], time.monotonic()
        self._record_idle(sum(totals[phase] for phase in ON_DEVICE))

    def _record_idle(self, busy: float) -> None:
        self._busy += busy
        if (elapsed := self._recorded - self._idle_since) >= self._idle_seconds:
            self._idle.set(max(1 - self._busy / elapsed, 0.0))
            self._busy, self._idle_since, self._idle_seconds = 0.0, self._recorded, _IDLE_SECONDS


class RunMetrics:
    """How far the run is, as its driver knows it."""

    def __init__(self, run: str) -> None:
        """Name the run."""
        self._done = Gauge("everymask_run_images_done", "Images of the run that have a row.", ("run",))
        self._total = Gauge("everymask_run_images", "Images of the run.", ("run",))
        for gauge in (self._done, self._total):
            gauge.set_default_tags({"run": run})

    def show(self, done: int, images: int) -> None:
        """How many images have a row, those of former runs of the same command too, of how many that are known."""
        self._done.set(done)
        self._total.set(images)  # each time: Ray forgets what is not said again
