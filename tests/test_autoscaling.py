"""A run on a cluster that grows, loses a machine, and shrinks, by Ray's own autoscaler.

The machines are Ray's fake ones: raylets on this machine, which the autoscaler on the head starts and ends as it
would virtual machines.
"""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from ray_heads import free_port, head_of, session_folder
from running import TIMEOUT_S, Process, call, command, processes_with, rows, write_jpegs
from runs_of_masks import job

pytestmark = pytest.mark.alone

MACHINES = 2
FAKE_HEAD = "f" * 51 + "00000"  # Ray's id for it


class Head(NamedTuple):
    """A head that starts machines."""

    environment: dict[str, str]
    """What leads a driver to it."""
    folder: str

    def machines(self) -> list[Process]:
        """The raylets besides the head's own, which the autoscaler has started."""
        raylets = [one for one in processes_with(self.folder) if "/raylet/raylet " in one.command]
        return [raylet for raylet in raylets if FAKE_HEAD not in raylet.command]


def cluster_config(port: int) -> dict[str, object]:
    """As `ray-cluster.yaml`, in small, but for the provider."""
    return {
        "cluster_name": "fake",
        "max_workers": MACHINES,
        "idle_timeout_minutes": 0.15,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": f"127.0.0.1:{port}",
            "head_node_id": FAKE_HEAD,
            "launch_multiple": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "auth": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        **{f"{kind}_commands": [] for kind in ("initialization", "setup", "head_setup", "worker_setup")},
        **{f"{kind}_start_ray_commands": [] for kind in ("head", "worker")},
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "machine": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": MACHINES},
        },
    }


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Head]:
    temp, port = session_folder(), free_port()
    (tmp_path / "cluster.json").write_text(json.dumps(cluster_config(port)))
    environment = {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD,
        "RAY_NODE_TYPE_NAME": "ray.head.default",
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    both = {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": uuid.uuid4().hex * 2,
    }
    words = [
        *(Path(sys.executable).parent / "ray", "start", "--head", "--block", "--num-cpus=0"),
        *(f"--port={port}", f"--temp-dir={temp}", "--include-dashboard=false"),
        *("--node-ip-address=127.0.0.1", f"--autoscaling-config={tmp_path / 'cluster.json'}"),
    ]
    with head_of(words, temp, tmp_path / "head.log", environment | both):
        yield Head(both | {"RAY_ADDRESS": f"127.0.0.1:{port}"}, temp)


def wait_until(is_so: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not is_so():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.1)


def test_a_run_on_machines_that_come_and_go(tmp_path: Path, tiny_checkpoint: Path, head: Head) -> None:
    assert head.machines() == []
    images, output = write_jpegs(tmp_path / "in", 120), tmp_path / "out"
    flags = [*job(tiny_checkpoint, images, output, "--images-per-shard", "4", "--cpus-per-worker", "1")]
    with (tmp_path / "driver.log").open("w") as log:
        driver = subprocess.Popen(
            command(*map(str, flags), "--num-workers", str(MACHINES)),
            env=os.environ | head.environment,
            stderr=log,
            stdout=log,
        )

    def done() -> int:
        assert driver.poll() is None, (tmp_path / "driver.log").read_text()
        return len(list((output / "masks").glob("part-*.parquet")))

    try:
        wait_until(lambda: done() >= 1 and len(head.machines()) == MACHINES, "the cluster has not grown")
        os.kill(head.machines()[0].pid, signal.SIGKILL)
        assert driver.wait(TIMEOUT_S) == 0, (tmp_path / "driver.log").read_text()
    finally:
        driver.kill()
        driver.wait()
    assert [row["status"] for row in rows(output)] == ["ok"] * 120
    verified = call("jobs.verify_masks", "--output", output)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    wait_until(lambda: head.machines() == [], "the cluster has not shrunk")
