"""The Ray graph: shard numbers in, a pool of actors with one model each, shard summaries out.

Ray Data schedules, restarts and scales; correctness does not lean on it. A shard's file is the truth, a
worker that repeats a shard writes the same rows under the same name, and what Ray drops is missed at the
end. Pixels, masks and embeddings never travel through Ray's object store.
"""

import logging
import os
import queue
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

if "RAY_ADDRESS" not in os.environ:
    # A Ray of our own listens on the loopback interface only. Ray reads this when it is imported.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch
from numpy.typing import NDArray
from ray.data._internal.execution.streaming_executor import StreamingExecutor
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline import estimate
from pipeline.amg.selfcheck import checked_model
from pipeline.config import RunConfig
from pipeline.contents import content_of
from pipeline.decoding import Decoders
from pipeline.errors import CheckpointError, IncompleteRun, SettingsError, TooManyFailures
from pipeline.estimate import Measured
from pipeline.model import pick_device
from pipeline.progress import Progress
from pipeline.run import Run
from pipeline.shard import ShardSummary, make_shard
from pipeline.sources import ImageRef

_ATTEMPTS: Final = 6  # a shard that has killed its worker this often is left missing, and the run says so
_SHARDS_AT_ONCE: Final = 10_000  # of one Ray Dataset: each takes 35 KB of the driver, and 2.5 ms at the start
_JUDGED_AFTER: Final = 100  # images, before the failure rate means anything
_REPORT_SECONDS: Final = 1.0
_NO_GPU: Final = "There is no GPU here; use --device cpu, or a cluster's RAY_ADDRESS."
_CLOSING_SECONDS: Final = 1.0  # `ray job stop` kills the driver after three
_SCHEDULING_SECONDS: Final = 10.0  # for a thread that ends within a fraction of one unless the machine is busy
_log = logging.getLogger("everymask")
_Batch = dict[str, NDArray[Any]]


@contextmanager
def connected() -> Iterator[None]:
    """Ray for the time of the block: the cluster that `$RAY_ADDRESS` names, or a local one of our own.

    `ray job submit` sets the variable. At the end our workers are ended, and so is a local Ray.
    """
    on_terminate = signal.getsignal(signal.SIGTERM)
    ray.init(os.environ.get("RAY_ADDRESS", "local"), logging_level=logging.WARNING)
    signal.signal(signal.SIGTERM, on_terminate)  # Ray puts its own, which ends the process
    try:
        yield
    finally:
        _end_scheduling()
        ray.shutdown()


def _end_scheduling() -> None:
    """End the threads in which Ray Data schedules, where a run is left before its end.

    Whichever of them asks something of Ray after `ray.shutdown` has the whole process ended by Ray's core, with
    exit code 1. A dataset has no public way to be given up while a thread reads from it.
    """
    for thread in threading.enumerate():
        if isinstance(thread, StreamingExecutor):
            thread.shutdown(force=True)
            thread.join(_SCHEDULING_SECONDS)


def check_device(config: RunConfig) -> None:
    """Fail early where a local Ray would lack the device. What a cluster has, it says when it is asked.

    Raises:
        SettingsError: the device is not there.
    """
    if "RAY_ADDRESS" in os.environ:
        return
    if (config.model.device == "cuda" or config.cluster.gpus_per_worker) and not torch.cuda.is_available():
        raise SettingsError(_NO_GPU)
    pick_device(config.model.device)


def make_shards(run: Run, shards: list[int]) -> Iterator[ShardSummary]:
    """Make shards on the connected Ray, and show progress.

    Args:
        run: The run they belong to.
        shards: Their numbers.

    Yields:
        Each finished shard's summary, as they finish. A shard that failed is not among them.

    Raises:
        IncompleteRun: workers could not be started.
        SettingsError: the local machine lacks the device.
        TooManyFailures: as `max_failure_rate` says. Finished shards stay.
    """
    config = run.config
    images_to_do = sum(_images_in(shard, run) for shard in shards)
    progress = Progress(run.images, run.images - images_to_do, with_masks=config.kind == "masks")
    board = _board_here()
    try:
        images = masks = failed = 0
        for summary in _results(run, shards, board):
            if summary is not None:
                images, masks, failed = images + summary.images, masks + summary.masks, failed + summary.failed
                yield summary
            in_work = ray.get(board.read.remote())
            counts = (images + in_work[0], masks + in_work[1], failed + in_work[2])
            progress.show(*counts)
            _judge(counts[2], counts[0], images_to_do, config.max_failure_rate)
    finally:
        progress.close()
        _close(board)


def _board_here() -> Any:
    """A board on the driver's node, which lives as long as the run: other nodes may be taken away."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(num_cpus=0)(_Board)
    return actor.options(scheduling_strategy=here).remote()


def _last_line(error: Exception) -> str:
    """Ray's errors end with the cause."""
    return (str(error).strip() or repr(error)).splitlines()[-1]


def _close(board: Any) -> None:
    """Bring writing to its end, so that what is there now is what will be there."""
    deadline = time.monotonic() + _CLOSING_SECONDS
    with suppress(ray.exceptions.RayError):
        while not ray.get(board.close.remote(), timeout=_CLOSING_SECONDS) and time.monotonic() < deadline:
            time.sleep(0.05)


def measure_sample(config: RunConfig, sample: list[ImageRef]) -> tuple[Measured, int]:
    """Make a sample of a run's images as one of its workers would, on the connected Ray.

    Returns:
        What it took, and how many workers the run would have.

    Raises:
        IncompleteRun: it failed.
        SettingsError: the local machine lacks the device.
    """
    workers, cpus, gpus = _resources(config)
    task: Any = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(_measure)
    try:
        measured: Measured = ray.get(task.remote(config, sample, max(1, int(cpus))))
    except ray.exceptions.RayError as error:
        raise IncompleteRun(f"The sample could not be made: {_last_line(error)}") from error
    return measured, workers


def _measure(config: RunConfig, sample: list[ImageRef], threads: int) -> Measured:
    torch.set_num_threads(threads)
    return estimate.measure(config, sample)


class ShardWorker:
    """An actor's life: load the model once, then make shards."""

    def __init__(self, config: RunConfig, provenance: dict[str, Any], board: Any, threads: int) -> None:
        torch.set_num_threads(threads)
        self._config, self._provenance, self._board = config, provenance, board
        model = checked_model(config.model)
        expected = provenance["determinants"]["weights_sha256"]
        if model.weights_sha256 != expected:
            raise CheckpointError(f"{config.model.address} has changed since the run began: {expected} then.")
        self._content, self._decode = content_of(config, model), Decoders(config.reading)

    def __call__(self, batch: _Batch) -> _Batch:
        """Make the one shard of a batch.

        Raises:
            RuntimeError: it has killed its worker too often. Ray drops a call that raises, and repeats one whose
                worker died without end.
        """
        (shard,) = batch["shard"].tolist()
        if ray.get(self._board.begin.remote(shard)) > _ATTEMPTS:
            raise RuntimeError(f"shard {shard} has killed its worker {_ATTEMPTS} times; it is left out")
        reported = 0.0

        def on_image(images: int, masks: int, failed: int) -> None:
            nonlocal reported
            if time.monotonic() - reported >= _REPORT_SECONDS:
                reported = time.monotonic()
                self._board.report.remote(shard, images, masks, failed)

        def before_write() -> None:
            if not ray.get(self._board.may_write.remote(shard)):
                raise RuntimeError(f"the run was stopped before shard {shard} was written")

        try:
            summary = make_shard(
                shard,
                self._config,
                self._content,
                self._decode,
                self._provenance,
                on_image=on_image,
                before_write=before_write,
            )
        except torch.AcceleratorError:
            # A CUDA error stays in its process for good. Ray starts another, which does the shard again.
            _log.exception("the device failed; starting this worker anew")
            os._exit(1)
        self._board.forget.remote(shard)
        return {"summary": np.array([summary.to_json()])}


class _Board:
    """An actor where workers post how far their shards are, and which outlives them."""

    def __init__(self) -> None:
        self._shards: dict[int, tuple[int, int, int]] = {}
        self._attempts: Counter[int] = Counter()
        self._writing: set[int] = set()
        self._closed = False

    def begin(self, shard: int) -> int:
        """Which attempt at the shard this is, from 1."""
        self._attempts[shard] += 1
        self._shards.pop(shard, None)
        self._writing.discard(shard)
        return self._attempts[shard]

    def report(self, shard: int, images: int, masks: int, failed: int) -> None:
        self._shards[shard] = (images, masks, failed)

    def may_write(self, shard: int) -> bool:
        """Whether the run goes on, so that the shard's file may be written."""
        if not self._closed:
            self._writing.add(shard)
        return not self._closed

    def close(self) -> bool:
        """Let no file be written any more. Whether none is being written."""
        self._closed = True
        return not self._writing

    def forget(self, shard: int) -> None:
        self._shards.pop(shard, None)
        self._writing.discard(shard)
        del self._attempts[shard]

    def read(self) -> tuple[int, int, int]:
        """Images, masks and failures of the shards in work."""
        rows = [(0, 0, 0), *self._shards.values()]
        images, masks, failed = (sum(column) for column in zip(*rows, strict=True))
        return images, masks, failed


def _dataset(run: Run, shards: list[int], board: Any) -> ray.data.Dataset:
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # ours takes its place
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = -1  # a failed shard must not end the others; it is missed at the end
    context.max_consecutive_actor_init_deaths = 3
    context.execution_no_progress_timeout_s = -1  # a cluster may take long to find a machine
    workers, cpus, gpus = _resources(run.config)
    workers = min(workers, len(shards))
    # One block a shard, made here: repartitioning would need a CPU of its own, which workers may hold.
    dataset = ray.data.from_arrow([pa.table({"shard": [shard]}) for shard in shards])
    dataset.set_name("everymask")
    return dataset.map_batches(
        ShardWorker,
        batch_size=1,
        num_cpus=cpus,
        num_gpus=gpus,
        # All are asked for at once, which is what an autoscaler goes by; work begins with the first.
        compute=ray.data.ActorPoolStrategy(
            min_size=1, initial_size=workers, max_size=workers, max_tasks_in_flight_per_actor=2
        ),
        fn_constructor_args=(run.config, run.provenance, board, max(1, int(cpus))),
    )


def _results(run: Run, shards: list[int], board: Any) -> Iterator[ShardSummary | None]:
    """The summaries of shards as they finish; None after each second without one."""
    finished: queue.SimpleQueue[ShardSummary | Exception | None] = queue.SimpleQueue()
    for start in range(0, len(shards), _SHARDS_AT_ONCE):
        dataset = _dataset(run, shards[start : start + _SHARDS_AT_ONCE], board)
        threading.Thread(target=_drain, args=(dataset, finished), daemon=True).start()
        while True:
            try:
                item = finished.get(timeout=_REPORT_SECONDS)
            except queue.Empty:
                yield None
                continue
            if item is None:
                break
            if isinstance(item, Exception):
                raise IncompleteRun(f"Ray gave the run up: {_last_line(item)}") from item
            yield item


def _drain(dataset: ray.data.Dataset, finished: "queue.SimpleQueue[ShardSummary | Exception | None]") -> None:
    """In a thread of its own: Ray's results, its failure, or None at the end."""
    try:
        for row in dataset.iter_rows():
            finished.put(ShardSummary.from_json(row["summary"]))
    except Exception as error:  # noqa: BLE001 (raised again by the thread that reads the queue)
        finished.put(error)
    else:
        finished.put(None)


def _resources(config: RunConfig) -> tuple[int, float, float]:
    """Workers at most, and the CPUs and GPUs of each."""
    cluster, there = config.cluster, ray.cluster_resources()  # type: ignore[no-untyped-call]
    on_gpu = config.model.device == "cuda" or (config.model.device == "auto" and there.get("GPU", 0) > 0)
    gpus = cluster.gpus_per_worker if cluster.gpus_per_worker is not None else float(on_gpu)
    if gpus and not there.get("GPU"):
        if "RAY_ADDRESS" not in os.environ:
            raise SettingsError(_NO_GPU)
        _log.warning("The cluster has no GPU yet; waiting for the autoscaler to bring one.")
    cpus = cluster.cpus_per_worker or (1.0 if on_gpu else min(4.0, there.get("CPU", 4.0)))
    if "RAY_ADDRESS" not in os.environ and (cpus > there.get("CPU", 0) or gpus > there.get("GPU", 0)):
        raise SettingsError(
            f"A worker is to have {cpus:g} CPUs and {gpus:g} GPUs, and this machine has {there.get('CPU', 0):g} "
            f"and {there.get('GPU', 0):g}. Lower --cpus-per-worker or --gpus-per-worker."
        )
    fitting = there.get("GPU", 0) / gpus if gpus else there.get("CPU", 0) / cpus
    return cluster.num_workers or max(1, int(fitting)), cpus, gpus


def _images_in(shard: int, run: Run) -> int:
    size = run.config.images_per_shard
    return min(size, run.images - shard * size)


def _judge(failed: int, images: int, images_to_do: int, max_rate: float) -> None:
    if images >= min(_JUDGED_AFTER, images_to_do) and failed > max_rate * images:
        raise TooManyFailures(
            f"{failed} of {images} images failed, more than --max-failure-rate {max_rate} allows. Finished "
            "shards are kept; summary.json counts the failures by reason, each row's error says more."
        )
