"""The engine on a real local Ray: what workers get, how often a shard is tried, where the board lives."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import ray

from pipeline import engine
from pipeline.board import Board
from pipeline.config import ClusterConfig, MasksConfig, ModelConfig
from pipeline.engine_worker import ShardWorker, last_line
from pipeline.errors import IncompleteRun, SettingsError
from pipeline.plan import Counts, Plan
from pipeline.reconcile import ToDo
from pipeline.run import Run
from pipeline.shard import ShardSummary

pytestmark = pytest.mark.alone


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    with engine.connected():
        yield


def settings(cluster: dict[str, Any], device: Any = "cpu") -> MasksConfig:
    return MasksConfig(
        images="file:///in",
        output="file:///out",
        cluster=ClusterConfig(**cluster),
        model=ModelConfig(device=device),
    )


@pytest.mark.usefixtures("local_ray")
def test_workers_share_the_cpus() -> None:
    cpus = ray.cluster_resources()["CPU"]  # type: ignore[no-untyped-call]
    each = min(4, cpus)
    assert engine._resources(settings({})) == (max(1, cpus // each), each, 0)
    assert engine._resources(settings({"cpus_per_worker": 0.5})) == (cpus * 2, 0.5, 0)
    assert engine._resources(settings({"cpus_per_worker": 1, "num_workers": 7})) == (7, 1, 0)


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("cluster", [{"cpus_per_worker": 1000}, {"gpus_per_worker": 64}])
def test_more_than_this_machine_has_is_refused(cluster: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError):
        engine._resources(settings(cluster))
    monkeypatch.setenv("RAY_ADDRESS", "auto")  # an autoscaler may bring it
    _, cpus, gpus = engine._resources(settings(cluster))
    assert cluster.items() <= {"cpus_per_worker": cpus, "gpus_per_worker": gpus}.items()


@pytest.mark.usefixtures("local_ray")
def test_a_cluster_without_gpu_yet_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    assert engine._resources(settings({"num_workers": 3}, "cuda")) == (3, 1, 1)
    assert engine._resources(settings({"gpus_per_worker": 0.5, "num_workers": 3}, "cuda")) == (3, 1, 0.5)
    assert "waiting for the autoscaler" in caplog.text
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 32.0, "GPU": 8.0})
    assert engine._resources(settings({}, "auto")) == (8, 1, 1)
    assert engine._resources(settings({"gpus_per_worker": 0.5}, "auto")) == (16, 1, 0.5)


@pytest.mark.usefixtures("local_ray")
def test_a_shard_is_begun_six_times_and_then_left_out() -> None:
    board = Board()
    board.expect([5])
    worker = object.__new__(ShardWorker)
    worker._name = "worker"
    worker._notice = cast(Any, SimpleNamespace(working=nullcontext, check=lambda: None))
    worker._board = SimpleNamespace(begin=SimpleNamespace(remote=lambda *given: ray.put(board.begin(*given))))
    assert [board.begin(5, "worker") for _ in range(6)] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(RuntimeError, match="shard 5 has killed its worker 6 times"):
        worker({"shard": np.array([5])})
    [failed] = board.read().failed_shards
    assert failed == {"shard": 5, "error": "it has killed its worker 6 times"}
    assert board.over()


LEFT_RUN = """
import threading
import time

import ray.data
from ray.data._internal.execution.streaming_executor import StreamingExecutor

from pipeline import engine


def slow(batch):
    time.sleep(0.5)
    return batch


def scheduling():
    return any(isinstance(thread, StreamingExecutor) for thread in threading.enumerate())


def read():
    for _ in ray.data.range(100, override_num_blocks=100).map_batches(slow).iter_rows():
        first.set()


first = threading.Event()
with engine.connected():
    threading.Thread(target=read, daemon=True).start()
    assert first.wait(60)
    before = scheduling()
    engine._end_scheduling()
    print(before, scheduling())
"""


def test_no_scheduling_goes_on_after_a_run_was_left() -> None:
    done = subprocess.run([sys.executable, "-c", LEFT_RUN], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "True False", done.stdout + done.stderr


class Finished:
    """What Ray makes of some shards; it breaks at number 99."""

    def __init__(self, shards: list[int]) -> None:
        self.shards = shards

    def iter_batches(self, **_: Any) -> Iterator[dict[str, list[str]]]:
        for shard in self.shards:
            if shard == 99:
                raise ValueError("Traceback ...\n  in a worker\nOSError: no space left")
            yield {"summary": [ShardSummary(shard, 1, 0, {"empty": 1}, 9, 0.1).to_json()]}


def results(shards: list[int], monkeypatch: pytest.MonkeyPatch) -> tuple[list[list[int]], Iterator[int]]:
    """The shards of each dataset, and those that are finished."""
    asked: list[list[int]] = []

    def dataset(_run: Any, some: list[int], _board: Any) -> Finished:
        asked.append(some)
        return Finished(some)

    monkeypatch.setattr(engine, "_SHARDS_AT_ONCE", 2)
    monkeypatch.setattr(engine, "_dataset", dataset)
    plan = Plan(Counts(1000, 1000))
    run = cast(Run, SimpleNamespace(plan=plan, shards=plan.counts.shards))
    summaries = engine._results(run, ToDo(run, plan.counts, shards), None)
    return asked, (summary.shard for summary in summaries if summary is not None)


def test_a_dataset_takes_some_of_the_shards_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, finished = results([3, 4, 5, 6, 7], monkeypatch)
    assert next(finished) == 3
    assert asked == [[3, 4]]
    assert list(finished) == [4, 5, 6, 7]
    assert asked == [[3, 4], [5, 6], [7]]


def test_what_ray_raises_ends_the_run_with_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    _, finished = results([1, 2, 3, 99], monkeypatch)
    with pytest.raises(IncompleteRun, match="Ray gave the run up: OSError: no space left"):
        list(finished)


THREE_NODES = """
import ray
from ray.cluster_utils import Cluster

from pipeline import engine

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
for _ in range(2):
    cluster.add_node(num_cpus=1)
ray.init(cluster.address)


class Board:  # of this script, so that its process need not import torch
    def node(self):
        return ray.get_runtime_context().get_node_id()


engine.Board = Board
boards = [engine._board_here() for _ in range(5)]
nodes = [ray.get(board.node.remote()) for board in boards]
print(len(ray.nodes()), set(nodes) == {ray.get_runtime_context().get_node_id()})
ray.shutdown()
cluster.shutdown()
"""


def test_the_board_is_on_the_drivers_node() -> None:
    done = subprocess.run([sys.executable, "-c", THREE_NODES], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "3 True", done.stdout + done.stderr


@pytest.mark.parametrize("text", ["", "\n \n", "first\n  at line 3\nValueError: the cause\n"])
def test_the_last_line_of_an_error(text: str) -> None:
    assert last_line(ValueError(text)) in {repr(ValueError(text)), "ValueError: the cause"}
