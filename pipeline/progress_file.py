"""`progress.json`, written beside the shards while they are made. `schemas.progress` says what is in it."""

import logging
import threading
import time
from collections import Counter, deque
from datetime import UTC, datetime
from typing import Final, Self

from pipeline import storage
from pipeline.board import SLOWEST, AtWork, Work
from pipeline.documents import as_json
from pipeline.errors import StorageError
from pipeline.reconcile import ToDo
from pipeline.run import OutputSettings, Run
from pipeline.shard import ShardSummary
from schemas.masks import PROCESSED
from schemas.progress import SCHEMA_VERSION, ImageInWork, Progress, ShardInWork, SlowShard, State

SECONDS_BETWEEN_WRITES: Final = 10.0
_PATIENCE_S: Final = 5.0  # with a storage that does not answer: the next time will do
_RECENT_S: Final = 60.0
_AT_WORK_S: Final = 15.0  # a worker that was heard of within this
_LISTED: Final = 100
_log = logging.getLogger("everymask")


class ProgressFile:
    """Within its block, writes `OUTPUT/progress.json` every ten seconds, in a thread of its own.

    Where it cannot be written, the log says so once, and the run goes on.
    """

    def __init__(self, run: Run[OutputSettings], to_do: ToDo) -> None:
        """Know what is to be done.

        Args:
            run: The run.
            to_do: The shards that this command is to make.
        """
        self._run = run
        self._images_before, self._shards_before = to_do.images_before, to_do.shards_before
        self._started, self._start = datetime.now(UTC), time.monotonic()
        self._recent = deque([(0.0, 0, 0)])  # seconds since the start, images, masks
        self._lock = threading.Lock()
        self._work: Work | None = None
        self._shards = self._images = self._masks = 0
        self._worker_seconds = 0.0
        self._failures: Counter[str] = Counter()
        self._slowest: list[SlowShard] = []
        self._failing = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._write_on, name="progress.json", daemon=True)

    def __enter__(self) -> Self:
        """Begin to write."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Write no more."""
        self._stop()

    def show(self, work: Work) -> None:
        """What is in work now."""
        with self._lock:
            self._work = work

    def finished(self, summary: ShardSummary) -> None:
        """A shard has its file."""
        with self._lock:
            self._shards += 1
            self._images += summary.images
            self._masks += summary.masks
            self._worker_seconds += summary.seconds
            self._failures.update({name: n for name, n in summary.statuses.items() if name not in PROCESSED})
            slow: SlowShard = {"shard": summary.shard, "seconds": summary.seconds, "images": summary.images}
            self._slowest = sorted([*self._slowest, slow], key=lambda one: one["seconds"], reverse=True)[:SLOWEST]

    def end(self, state: State) -> None:
        """Write it for the last time."""
        self._stop()
        if not self._thread.is_alive():  # what it is at could come after what is written now
            self._write(state)

    def _stop(self) -> None:
        self._ended.set()
        self._thread.join(_PATIENCE_S)

    def _write_on(self) -> None:
        self._write("running")
        while not self._ended.wait(SECONDS_BETWEEN_WRITES):
            self._write("running")

    def _write(self, state: State) -> None:
        document = as_json(self.document(state))
        try:
            with storage.at_most(_PATIENCE_S):
                storage.write_atomic(f"{self._run.config.output}/progress.json", document)
        except StorageError as error:
            if not self._failing:
                _log.warning("progress.json is not written, and the run goes on: %s", error)
            self._failing = True

    def document(self, state: State) -> Progress:
        """What is known now. With any state but running, nothing is in work."""
        with self._lock:
            return self._document(state)

    def _document(self, state: State) -> Progress:
        run, work = self._run, self._work or Work()
        listed, counts = run.plan.ended, run.plan.counts
        running = state == "running"
        seconds = time.monotonic() - self._start
        # After the end, what is in work has no file and is not done.
        images = self._images + (work.images if running else 0)
        masks = self._masks + (work.masks if running else 0)
        failures = self._failures + (work.failures if running else Counter())
        recent = self._recent_rates(seconds, images, masks)
        rate = recent[0] or _rate(images, seconds)
        left = counts.images - self._images_before - images
        at_work = sorted(work.at_work, key=_seconds_at_hand, reverse=True) if running else []
        worked = self._worker_seconds + sum(one.seconds - _seconds_at_hand(one) for one in work.at_work)
        worked_images = self._images + work.images
        return {
            "schema_version": SCHEMA_VERSION,
            "run_id": run.run_id,
            "fingerprint": run.fingerprint,
            "state": state,
            "started": self._started.isoformat(timespec="seconds"),
            "updated": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(seconds, 3),
            "images": counts.images,
            "listed": listed,
            "images_before": self._images_before,
            "images_done": images,
            "failed": failures.total(),
            "failures": dict(failures.most_common()),
            "masks": masks,
            "images_per_second": _rate(images, seconds),
            "images_per_second_recent": recent[0],
            "masks_per_second": _rate(masks, seconds),
            "masks_per_second_recent": recent[1],
            "seconds_left": round(left / rate, 1) if rate and listed else None,
            "seconds_per_image": round(worked / worked_images, 6) if worked_images else None,
            "shards": counts.shards,
            "shards_before": self._shards_before,
            "shards_done": self._shards,
            "workers": None if self._work is None else sum(one.silent_seconds <= _AT_WORK_S for one in at_work),
            "workers_died": work.died,
            "shards_in_work": len(at_work),
            "in_work": [self._in_work(one) for one in at_work[:_LISTED]],
            "shards_failed": len(work.failed_shards),
            "failed_shards": list(work.failed_shards[:_LISTED]),
            "slowest_images": list(work.slowest),
            "slowest_shards": self._slowest,
        }

    def _recent_rates(self, seconds: float, images: int, masks: int) -> tuple[float, float]:
        """Images and masks per second, since about a minute ago; none where a repeated shard took images back."""
        while len(self._recent) > 1 and self._recent[1][0] <= seconds - _RECENT_S:
            self._recent.popleft()
        before = self._recent[0]
        self._recent.append((seconds, images, masks))
        since = seconds - before[0]
        return max(_rate(images - before[1], since), 0.0), max(_rate(masks - before[2], since), 0.0)

    def _in_work(self, one: AtWork) -> ShardInWork:
        post = one.post
        return {
            "shard": post.shard,
            "attempt": one.attempt,
            "seconds": round(one.seconds, 1),
            "silent_seconds": round(one.silent_seconds, 1),
            "images": post.images,
            "of": self._run.images_in(post.shard),
            "masks": post.masks,
            "failed": sum(post.failures.values()),
            "image": _rounded(post.image),
            "died_at": _rounded(one.died_at),
        }


def _seconds_at_hand(one: AtWork) -> float:
    return one.post.image["seconds"] if one.post.image is not None else 0.0


def _rate(count: int, seconds: float) -> float:
    return round(count / seconds, 3) if seconds > 0 else 0.0


def _rounded(image: ImageInWork | None) -> ImageInWork | None:
    return None if image is None else {**image, "seconds": round(image["seconds"], 1)}
