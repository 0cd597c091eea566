"""A worker on Ray: it holds one model and makes the shards that it is given, and at the end those of others.

What it says of them goes to the board, to the metrics and to its events.
"""

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from pipeline.amg.selfcheck import checked_model
from pipeline.config import RunConfig
from pipeline.decoding import Decoders
from pipeline.engine_metrics import WorkerMetrics, logs_folder, worker_name
from pipeline.errors import CheckpointError
from pipeline.events import EventLog, ShardEvents
from pipeline.ledger import ATTEMPTS
from pipeline.posting import ShardPosts
from pipeline.predict import content_of
from pipeline.preemption import Notice
from pipeline.shard import ImageDone, ShardSummary, make_shard
from pipeline.storage import redact

SPARE: Final = -1
"""In place of a shard's number: help with what is left."""
REPORT_SECONDS: Final = 1.0
"""Between two posts of a worker, and between two looks of the driver at them."""

_LEAVING_SECONDS: Final = 10.0  # of a worker that is told to go, for its image or the writing of its file
_GIVING_BACK_SECONDS: Final = 1.0
_log = logging.getLogger("everymask")
_Batch = dict[str, NDArray[Any]]


class ShardWorker:
    """An actor's life: load the model once, then make shards."""

    def __init__(self, run: str, config: RunConfig, provenance: dict[str, Any], board: Any, threads: int) -> None:
        torch.set_num_threads(threads)
        logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
        _log.setLevel(logging.INFO)  # which decoder a GPU was found to be faster with
        self._notice = Notice(_LEAVING_SECONDS)
        self._config, self._provenance, self._board = config, provenance, board
        self._name = str(ray.get_runtime_context().get_actor_id())  # which stays when it is started anew
        model = checked_model(config.model, kernels=config.kernels)
        expected = provenance["determinants"]["weights_sha256"]
        if model.weights_sha256 != expected:
            raise CheckpointError(f"{config.model.address} has changed since the run began: {expected} then.")
        self._content, self._decode = content_of(config, model), Decoders(config.reading)
        name = worker_name()
        self._events, self._metrics = EventLog(logs_folder(), run, name), WorkerMetrics(run, name)

    def __call__(self, batch: _Batch) -> _Batch:
        """Make the one shard of a batch, or help with what is left; no row where others have made it.

        Raises:
            RuntimeError: it has killed its worker too often. Ray drops a call that raises, and repeats one whose
                worker died without end.
        """
        (shard,) = batch["shard"].tolist()
        with self._notice.working():
            summary = self._help() if shard == SPARE else self._begin(shard)
            return {"summary": np.array([summary.to_json()] if summary else [], dtype=np.str_)}

    def _begin(self, shard: int) -> ShardSummary | None:
        self._notice.check()
        attempt = ray.get(self._board.begin.remote(shard, self._name))
        if attempt > ATTEMPTS:
            raise RuntimeError(f"shard {shard} has killed its worker {ATTEMPTS} times; it is left out")
        return self._make(shard, attempt) if attempt else None

    def _help(self) -> ShardSummary | None:
        """Make a shard that waits at another worker or takes long there; None when all are over."""
        while True:
            self._notice.check()
            spare = ray.get(self._board.spare.remote(self._name))
            if spare.over:
                return None
            if spare.shard is None:
                time.sleep(REPORT_SECONDS)
            elif summary := self._make(spare.shard, spare.attempt):
                return summary

    def _make(self, shard: int, attempt: int) -> ShardSummary | None:
        """None where another worker was first."""
        posts, events = ShardPosts(self._name, shard), ShardEvents(self._events, shard, attempt)
        overtaken = threading.Event()
        write_begun = 0.0

        def on_image(image: ImageDone) -> None:
            self._notice.check()
            if overtaken.is_set():
                raise _OvertakenError
            posts.done(image)
            events.image_done(image)
            self._metrics.image_done(image)

        def before_write() -> None:
            nonlocal write_begun
            self._notice.check()
            if not ray.get(self._board.may_write.remote(self._name)):
                raise RuntimeError(f"the run was stopped before shard {shard} was written")
            write_begun = time.monotonic()

        try:
            with _posted(self._board, posts, overtaken):
                summary = make_shard(
                    shard,
                    self._config,
                    self._content,
                    self._decode,
                    self._provenance,
                    on_begin=posts.begin,
                    on_image=on_image,
                    before_write=before_write,
                )
        except _OvertakenError:
            ray.get(self._board.failed.remote(shard, self._name, ""))
            return None
        except SystemExit:  # told to go
            with suppress(ray.exceptions.RayError):
                ray.get(self._board.give_back.remote(shard, self._name), timeout=_GIVING_BACK_SECONDS)
            raise
        except torch.AcceleratorError:
            # A CUDA error stays in its process for good. Ray starts another, which does the shard again.
            _log.exception("the device failed; starting this worker anew")
            os._exit(1)
        except Exception as error:
            ray.get(self._board.failed.remote(shard, self._name, redact(last_line(error))))
            raise
        write_seconds = time.monotonic() - write_begun
        ray.get(self._board.made.remote(shard, self._name))
        events.finished(summary, write_seconds)
        self._metrics.shard_written(write_seconds)
        return summary


class _OvertakenError(Exception):
    """Another worker has made the shard."""


@contextmanager
def _posted(board: Any, posts: ShardPosts, overtaken: threading.Event) -> Iterator[None]:
    """Post to the board every second, whatever the image at hand takes, and once at the end of the block.

    Args:
        board: The board.
        posts: What is to be said.
        overtaken: Set when the shard is not wanted any more.
    """
    ended = threading.Event()

    def post() -> None:
        with suppress(ray.exceptions.RayError):  # without a board there is no run
            while not ended.wait(REPORT_SECONDS):
                if not ray.get(board.report.remote(posts.post())):
                    overtaken.set()

    thread = threading.Thread(target=post, name="posts", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        board.report.remote(posts.post())


def last_line(error: Exception) -> str:
    """Of what an error says: Ray's end with the cause."""
    return (str(error).strip() or repr(error)).splitlines()[-1]
