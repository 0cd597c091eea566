"""A Ray cluster of two nodes on this machine, whose processes can be killed."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

# On the loopback interface only, the drivers too, which inherit it. Ray reads this when it is imported.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from ray.cluster_utils import Cluster
from running import Process, processes_with

CPUS: Final = 2
"""One on each node, as Ray counts them: so many workers of one CPU run at the same time."""


class TwoNodes:
    """A head, on which drivers run, and another node, which can be lost.

    Args:
        environment: Of the workers.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        self._common = {
            "num_cpus": CPUS // 2,
            "node_ip_address": "127.0.0.1",
            "include_dashboard": False,
            "dashboard_port": None,  # the first that is free: it is looked for all the same
            "env_vars": {"RAY_worker_niceness": "0"} | environment,  # 15 would wait for all else on a busy machine
        }
        self._cluster = Cluster(initialize_head=True, head_node_args=self._common)
        self._other = self._add_other()

    @property
    def address(self) -> str:
        """What `$RAY_ADDRESS` is to say."""
        address: str = self._cluster.address
        return address

    def workers(self) -> list[Process]:
        """Those that run, or load their model."""
        raylets = {_raylet(node) for node in self._cluster.list_all_nodes()}
        return [process for process in processes_with("ray::MapWorker") if process.parent in raylets]

    def lose_other_node(self) -> None:
        """Kill all processes of the second node, and put another in its place."""
        its_own = [worker for worker in self.workers() if worker.parent == _raylet(self._other)]
        self._cluster.remove_node(self._other, allow_graceful=False)
        for worker in its_own:
            kill(worker)
        self._other = self._add_other()

    def _add_other(self) -> Any:
        return self._cluster.add_node(wait=False, **self._common)

    def shutdown(self) -> None:
        self._cluster.shutdown()


def kill(process: Process) -> None:
    """Without a warning; it may have ended by itself."""
    with suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)


def _raylet(node: Any) -> int:
    pid: int = node.all_processes["raylet"][0].process.pid
    return pid


@contextmanager
def two_nodes(environment: dict[str, str]) -> Iterator[TwoNodes]:
    """The cluster while the block lasts."""
    cluster = TwoNodes(environment)
    try:
        yield cluster
    finally:
        cluster.shutdown()
