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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

from pipeline.cluster import check_answers, cluster_address

if cluster_address() is None:
    # A Ray of our own listens on the loopback interface only. Ray reads this when it is imported.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import pyarrow as pa
import ray
import ray.data
import torch
from ray.data._internal.execution.streaming_executor import StreamingExecutor
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline import estimate
from pipeline.board import Board
from pipeline.config import RunConfig
from pipeline.engine_metrics import RunMetrics, say_if_not_exported
from pipeline.engine_worker import REPORT_SECONDS, SPARE, ShardWorker, last_line
from pipeline.errors import ClusterError, IncompleteRun, SettingsError, TooManyFailures
from pipeline.manifest import largest_first
from pipeline.model import pick_device
from pipeline.progress import Progress
from pipeline.progress_file import ProgressFile
from pipeline.reconcile import ToDo
from pipeline.run import Run
from pipeline.shard import ShardSummary
from pipeline.sources import ImageRef

_SHARDS_AT_ONCE: Final = 10_000  # of one Ray Dataset: each takes 35 KB of the driver, and 2.5 ms at the start
_JUDGED_AFTER: Final = 100  # images, before the failure rate means anything
_NO_GPU: Final = "There is no GPU here; use --device cpu, or a cluster's RAY_ADDRESS."
_CLOSING_SECONDS: Final = 1.0  # `ray job stop` kills the driver after three
_LEFT_SECONDS: Final = 5.0  # without news once every shard is over, and what Ray still waits for is given up
_IN_FLIGHT: Final = 2  # calls that a worker is given at once
_SCHEDULING_SECONDS: Final = 10.0  # for a thread that ends within a fraction of one unless the machine is busy
_log = logging.getLogger("everymask")


@contextmanager
def connected() -> Iterator[None]:
    """Ray for the time of the block: the cluster that `$RAY_ADDRESS` names, or a local one of our own.

    `ray job submit` sets the variable. At the end our workers are ended, and so is a local Ray.

    Raises:
        ClusterError: the cluster does not answer, or Ray could not be started or connected to.
    """
    check_answers()
    on_terminate = signal.getsignal(signal.SIGTERM)
    address = cluster_address()
    try:
        ray.init(address or "local", logging_level=logging.WARNING)
    except Exception as error:  # some of Ray's are of no narrower class
        what = f"connected to at RAY_ADDRESS={address}" if address else "started on this machine"
        raise ClusterError(f"Ray could not be {what}: {last_line(error)}") from error
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
        ClusterError: the cluster does not answer.
        SettingsError: the device is not there.
    """
    if cluster_address() is not None:
        check_answers()
        return
    if (config.model.device == "cuda" or config.cluster.gpus_per_worker) and not torch.cuda.is_available():
        raise SettingsError(_NO_GPU)
    pick_device(config.model.device)


def make_shards(run: Run, to_do: ToDo, told: ProgressFile) -> Iterator[ShardSummary]:
    """Make shards on the connected Ray, and show progress.

    Args:
        run: The run they belong to.
        to_do: Which.
        told: Of what is in work.

    Yields:
        Each finished shard's summary, as they finish. A shard that failed is not among them.

    Raises:
        IncompleteRun: workers could not be started, or the images not be listed to the end.
        SettingsError: the local machine lacks the device.
        TooManyFailures: as `max_failure_rate` says. Finished shards stay.
    """
    config = run.config
    before = to_do.images_before
    progress = Progress(run.plan, before, with_masks=config.kind == "masks")
    say_if_not_exported()
    metrics = RunMetrics(run.run_id)
    board = _board_here()
    try:
        images = masks = failed = 0
        for summary in _results(run, to_do, board):
            if summary is not None:
                images, masks, failed = images + summary.images, masks + summary.masks, failed + summary.failed
                yield summary
            work = ray.get(board.read.remote())
            told.show(work)
            counts = (images + work.images, masks + work.masks, failed + work.failures.total())
            progress.show(*counts)
            metrics.show(before + counts[0], run.images)
            _judge(counts[2], counts[0], run.images - before, config.max_failure_rate)
    finally:
        progress.close()
        _close(board)


def _board_here() -> Any:
    """A board on the driver's node, which lives as long as the run: other nodes may be taken away."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(num_cpus=0)(Board)
    return actor.options(scheduling_strategy=here).remote()


def _close(board: Any) -> None:
    """Bring writing to its end, so that what is there now is what will be there."""
    deadline = time.monotonic() + _CLOSING_SECONDS
    with suppress(ray.exceptions.RayError):
        while not ray.get(board.close.remote(), timeout=_CLOSING_SECONDS) and time.monotonic() < deadline:
            time.sleep(0.05)


def measure_sample(config: RunConfig, sample: list[ImageRef]) -> tuple[ShardSummary, int]:
    """Make a sample of a run's images as one of its workers would, on the connected Ray.

    Returns:
        What it was and took, and how many workers the run would have.

    Raises:
        IncompleteRun: it failed.
        SettingsError: the local machine lacks the device.
    """
    workers, cpus, gpus = _resources(config)
    task: Any = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(_measure)
    try:
        made: ShardSummary = ray.get(task.remote(config, sample, max(1, int(cpus))))
    except ray.exceptions.RayError as error:
        raise IncompleteRun(f"The sample could not be made: {last_line(error)}") from error
    return made, workers


def _measure(config: RunConfig, sample: list[ImageRef], threads: int) -> ShardSummary:
    torch.set_num_threads(threads)
    return estimate.measure(config, sample)


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
    ray.get(board.expect.remote(shards))
    # Enough for a shard of each call that workers at the end have got and never end; one alone has no helper.
    spares = [SPARE] * (workers * _IN_FLIGHT if workers > 1 else 0)
    calls = largest_first(run.config.output, shards) + spares
    # One block a shard, made here: repartitioning would need a CPU of its own, which workers may hold.
    dataset = ray.data.from_arrow([pa.table({"shard": [shard]}) for shard in calls])
    dataset.set_name(f"everymask_{run.config.kind}_{run.run_id}")
    return dataset.map_batches(
        ShardWorker,
        batch_size=1,
        num_cpus=cpus,
        num_gpus=gpus,
        # All are asked for at once, which is what an autoscaler goes by; work begins with the first.
        compute=ray.data.ActorPoolStrategy(
            min_size=1, initial_size=workers, max_size=workers, max_tasks_in_flight_per_actor=_IN_FLIGHT
        ),
        fn_constructor_args=(run.run_id, run.config, run.provenance, board, max(1, int(cpus))),
    )


def _results(run: Run, to_do: ToDo, board: Any) -> Iterator[ShardSummary | None]:
    """The summaries of shards as they finish; None after each second without one."""
    finished: queue.SimpleQueue[ShardSummary | Exception | None] = queue.SimpleQueue()
    for shards in to_do.batches(_SHARDS_AT_ONCE):
        if not shards:
            yield None
            continue
        dataset = _dataset(run, shards, board)
        threading.Thread(target=_drain, args=(dataset, finished), daemon=True).start()
        yield from _until_over(finished, board)


def _until_over(
    finished: "queue.SimpleQueue[ShardSummary | Exception | None]", board: Any
) -> Iterator[ShardSummary | None]:
    """What one Dataset makes. A call of a frozen worker is not waited for once others have made its shard."""
    made: set[int] = set()
    heard = time.monotonic()
    while True:
        try:
            item = finished.get(timeout=REPORT_SECONDS)
        except queue.Empty:
            yield None
            if not ray.get(board.over.remote()):
                heard = time.monotonic()
            elif time.monotonic() - heard > _LEFT_SECONDS:
                _end_scheduling()
                return
            continue
        heard = time.monotonic()
        if item is None:
            return
        if isinstance(item, Exception):
            raise IncompleteRun(f"Ray gave the run up: {last_line(item)}") from item
        if item.shard not in made:  # as two workers may have written it
            made.add(item.shard)
            yield item


def _drain(dataset: ray.data.Dataset, finished: "queue.SimpleQueue[ShardSummary | Exception | None]") -> None:
    """In a thread of its own: Ray's results, its failure, or None at the end."""
    try:
        # One ahead, as `iter_rows` has it, would keep a finished shard back until the next one is finished.
        for batch in dataset.iter_batches(batch_size=None, prefetch_batches=0):
            for summary in batch["summary"]:
                finished.put(ShardSummary.from_json(summary))
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
        if cluster_address() is None:
            raise SettingsError(_NO_GPU)
        _log.warning("The cluster has no GPU yet; waiting for the autoscaler to bring one.")
    cpus = cluster.cpus_per_worker or (1.0 if on_gpu else min(4.0, there.get("CPU", 4.0)))
    if cluster_address() is None and (cpus > there.get("CPU", 0) or gpus > there.get("GPU", 0)):
        raise SettingsError(
            f"A worker is to have {cpus:g} CPUs and {gpus:g} GPUs, and this machine has {there.get('CPU', 0):g} "
            f"and {there.get('GPU', 0):g}. Lower --cpus-per-worker or --gpus-per-worker."
        )
    fitting = there.get("GPU", 0) / gpus if gpus else there.get("CPU", 0) / cpus
    return cluster.num_workers or max(1, int(fitting)), cpus, gpus


def _judge(failed: int, images: int, images_to_do: int, max_rate: float) -> None:
    if images >= min(_JUDGED_AFTER, images_to_do) and failed > max_rate * images:
        raise TooManyFailures(
            f"{failed} of {images} images failed, more than --max-failure-rate {max_rate} allows. Finished "
            "shards are kept; summary.json counts the failures by reason, each row's error says more."
        )
