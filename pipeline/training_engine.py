"""Ray Train: one distillation in several processes, each with a device, their gradients averaged.

`TorchTrainer` starts the workers and joins them by `torch.distributed`. Ray Data hands each of them the numbers of
the shards that it reads; pictures and embeddings stay in the worker that reads them. Checkpoints are the
training's own files and not Ray's, so that they are the same with and without it.
"""

import itertools
import logging
import os
import queue
import socket
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

from pipeline.engine import connected  # first: what it sets, Ray reads when it is imported

# isort: split
import pyarrow as pa
import ray
import ray.data
import ray.train
import ray.train.torch
from ray.train.backend import Backend, BackendConfig
from ray.train.torch import TorchConfig, TorchTrainer
from torch import distributed

from pipeline.cluster import cluster_address
from pipeline.errors import EverymaskError, IncompleteRun, SettingsError
from pipeline.training.distill import Plan, train

_ATTEMPTS: Final = 4  # to train on, with workers anew, from the last checkpoint
_LEAVING_SECONDS: Final = 5.0
_log = logging.getLogger("everymask")


def train_on_ray(plan: Plan) -> None:
    """Train with `plan.config.num_workers` workers on the cluster of $RAY_ADDRESS, or on a local Ray.

    If a worker is lost, all begin anew from the last checkpoint.

    Raises:
        ClusterError: as `pipeline.engine.connected`.
        Diverged, StorageError, TrainingDataError: as `pipeline.training.distill.train`.
        IncompleteRun: workers were lost, or could not be started, too often.
        SettingsError: this machine has too few devices.
    """
    with connected():
        _quieten()
        use_gpu = _use_gpu(plan)
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                _fit(plan, use_gpu=use_gpu)
            except ray.train.TrainingFailedError as error:
                _raise_own(error)
                cause = str(error).strip().splitlines()[-1]
                if attempt == _ATTEMPTS:
                    raise IncompleteRun(
                        f"Workers failed {attempt} times, lastly: {cause}. The same command goes on from the last "
                        "checkpoint."
                    ) from error
                _log.warning("workers failed, starting them anew: %s", cause)
            else:
                return


def _raise_own(error: ray.train.TrainingFailedError) -> None:
    """Raise what a worker raised on purpose, if that is why all failed: it would do so again."""
    if isinstance(error, ray.train.WorkerGroupError):
        for failure in error.worker_failures.values():
            if isinstance(failure, EverymaskError):
                raise failure from error


def _fit(plan: Plan, *, use_gpu: bool) -> None:
    """One attempt."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = TorchTrainer(
            _work,
            train_loop_config={"plan": plan},
            torch_config=None if cluster_address() else OnThisMachine(f"file://{folder}/workers"),
            scaling_config=ray.train.ScalingConfig(num_workers=plan.order.workers, use_gpu=use_gpu),
            run_config=ray.train.RunConfig(  # type: ignore[call-arg] # the types are those before version 2
                name="everymask",
                storage_path=folder,  # Ray keeps nothing there that is needed: checkpoints are ours
                logging_config=ray.train.LoggingConfig(log_level="WARNING"),
            ),
            datasets={"shards": _shards_of_all(plan)},
            # Each worker sees all numbers and takes its own: what Ray splits goes to whoever asks first, and a
            # training that goes on must read what it would have read.
            dataset_config=ray.train.DataConfig(datasets_to_split=[]),
        )
        # In a thread of its own, or Ray takes Ctrl-C for itself.
        ended: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        threading.Thread(target=_run, args=(trainer, ended), daemon=True).start()
        if (error := ended.get()) is not None:
            raise error


class OnThisMachine(TorchConfig):
    """Joins the workers of a local Ray on the loopback interface.

    By default the first of them would listen for the others on all of the machine's addresses.
    """

    def __init__(self, url: str) -> None:
        """Take the URL of a new file, by which the workers find each other."""
        super().__init__()
        self.url = url

    @property
    def backend_cls(self) -> type[Backend]:
        """What acts on this."""
        return _Loopback


class _Loopback(Backend):
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        assert isinstance(backend_config, OnThisMachine)  # noqa: S101 (for the type checker)
        backend = "nccl" if worker_group.get_resources_per_worker().get("GPU") else "gloo"
        workers = len(worker_group)
        ray.get(
            [
                worker_group.execute_single_async(rank, _join, backend, backend_config.url, rank, workers)
                for rank in range(workers)
            ]
        )

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        del backend_config
        ray.get(worker_group.execute_async(_leave), timeout=_LEAVING_SECONDS)


def _join(backend: str, url: str, rank: int, workers: int) -> None:
    loopback = socket.if_indextoname(1)
    os.environ.update(GLOO_SOCKET_IFNAME=loopback, NCCL_SOCKET_IFNAME=loopback)
    distributed.init_process_group(backend, init_method=url, rank=rank, world_size=workers)


def _leave() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _run(trainer: TorchTrainer, ended: "queue.SimpleQueue[Exception | None]") -> None:
    try:
        trainer.fit()
    except Exception as error:  # noqa: BLE001 (raised again by the thread that waits)
        ended.put(error)
    else:
        ended.put(None)


def _work(settings: dict[str, Any]) -> None:
    """A worker's life."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    rank = ray.train.get_context().get_world_rank()
    _log.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    _quieten()
    told = _Told(ray.train.get_dataset_shard("shards").iter_rows(), rank)
    train(settings["plan"], ray.train.torch.get_device(), rank=rank, shards=told)


def _quieten() -> None:
    """What Ray tells of its data sets is not what this is about."""
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    ray.data.DataContext.get_current().enable_progress_bars = False


class _Told:
    """The shards of one worker by epoch, as Ray Data tells them."""

    def __init__(self, rows: Iterable[dict[str, Any]], rank: int) -> None:
        mine = (row for row in rows if row["rank"] == rank)
        self._epochs: Iterator[tuple[int, Iterable[dict[str, Any]]]] = itertools.groupby(
            mine, lambda row: int(row["epoch"])
        )
        self._epoch, self._shards = -1, [0]

    def __call__(self, epoch: int) -> Sequence[int]:
        while self._epoch < epoch:
            try:
                self._epoch, rows = next(self._epochs)
            except StopIteration:
                break  # reading ahead of the training's end: any shards will do
            self._shards = [int(row["shard"]) for row in rows]
        return self._shards


def _shards_of_all(plan: Plan) -> ray.data.Dataset:
    """A row a shard, worker and epoch, in the order of reading."""
    order = plan.order
    # One more than are trained, and those that reading ahead may touch.
    ahead = plan.config.read_ahead // (order.steps_per_epoch * order.share)
    epochs = -(-plan.steps // order.steps_per_epoch) + ahead + 2
    rows = [
        {"epoch": epoch, "rank": rank, "shard": shard}
        for epoch in range(epochs)
        for rank in range(order.workers)
        for shard in order.shards(rank, epoch)
    ]
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    return ray.data.from_arrow(pa.Table.from_pylist(rows))


def _use_gpu(plan: Plan) -> bool:
    """Whether workers get a GPU each.

    Raises:
        SettingsError: a local Ray has too few for all, or Ray does not deal such devices out.
    """
    if plan.config.device not in {"auto", "cuda", "cpu"}:
        raise SettingsError(f"--num-workers goes with --device auto, cuda or cpu, not {plan.config.device}.")
    there = ray.cluster_resources()  # type: ignore[no-untyped-call]
    device, workers = plan.config.device, plan.order.workers
    use_gpu = device == "cuda" or (device == "auto" and there.get("GPU", 0) > 0)
    kind = "GPU" if use_gpu else "CPU"
    if there.get(kind, 0) < workers:
        if cluster_address() is None:
            raise SettingsError(
                f"{workers} workers need {workers} {kind}s, and there are {int(there.get(kind, 0))} here; use a "
                "smaller --num-workers, or a cluster's RAY_ADDRESS."
            )
        _log.warning("The cluster has too few %ss yet; waiting for the autoscaler to bring them.", kind)
    return use_gpu
