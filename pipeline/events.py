"""What a worker did, as lines of JSON: one a phase and shard.

For whatever collects the logs of a cluster; people have the driver's log.
"""

import json
import logging
from collections import defaultdict
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, Final

from pipeline.phases import PHASES, Phase
from pipeline.shard import ImageDone, ShardSummary

_FILE_BYTES: Final = 64 * 2**20
_FILES_KEPT: Final = 3
_log = logging.getLogger("everymask")


class EventLog:
    """A worker's file of events, `everymask-RUN-WORKER.log`, renewed as it grows."""

    def __init__(self, folder: Path, run: str, worker: str) -> None:
        """Open the file; where that fails, say so once, and write no events."""
        self._names = {"run": run, "worker": worker}
        self._events = logging.Logger("everymask.events")
        path = folder / f"everymask-{run}-{worker}.log"
        handler: logging.Handler = logging.NullHandler()
        try:
            handler = RotatingFileHandler(path, maxBytes=_FILE_BYTES, backupCount=_FILES_KEPT, encoding="utf-8")
        except OSError as error:
            _log.warning("No events are logged by this worker: %s", error)
        self._events.addHandler(handler)
        self._handler = handler

    def close(self) -> None:
        """Close the file."""
        self._handler.close()

    def write(self, **fields: Any) -> None:
        """Write one line: when, which run, which worker, and these fields."""
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._events.info(json.dumps({"time": time} | self._names | fields))


class ShardEvents:
    """One attempt at a shard: what its images took, summed up until it is finished."""

    def __init__(self, log: EventLog, shard: int, attempt: int) -> None:
        """Begin a shard, for the `attempt`-th time."""
        self._log, self._attempt = log, {"shard": shard, "attempt": attempt}
        self._seconds: defaultdict[Phase, list[float]] = defaultdict(list)
        self._bytes = 0

    def image_done(self, image: ImageDone) -> None:
        """Add an image."""
        for phase, seconds in image.seconds.items():
            self._seconds[phase].append(seconds)
        if image.reading is not None:
            self._bytes += image.reading.bytes

    def finished(self, summary: ShardSummary, write_seconds: float) -> None:
        """Write the lines of a shard whose file is there."""
        of_phase: dict[Phase, dict[str, Any]] = {
            "fetch": {"bytes": self._bytes},
            "write": {
                "bytes": summary.bytes,
                "masks": summary.masks,
                "statuses": summary.statuses,
                "shard_seconds": summary.seconds,
            },
        }
        self._seconds["write"] = [write_seconds]
        for phase in PHASES:
            if taken := self._seconds[phase]:
                self._log.write(
                    **self._attempt,
                    phase=phase,
                    images=summary.images if phase == "write" else len(taken),
                    seconds=round(sum(taken), 6),
                    slowest=round(max(taken), 6),
                    **of_phase.get(phase, {}),
                )
