"""A cluster of several machines, on one: a machine that is lost costs nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from running import KEEP_ALL, make_dataset, rows, write_jpegs
from runs_of_masks import summary_of

from pipeline.config import AmgConfig, MasksConfig

pytestmark = pytest.mark.alone

LOST_NODE = """
import os
import sys
import threading
import time
from pathlib import Path

os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
import ray
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
cluster.wait_for_nodes()
os.environ["RAY_ADDRESS"] = cluster.address

from jobs.command import run_command
from jobs.generate_masks import generate_masks

output = Path(sys.argv[sys.argv.index("--output") + 1])


def lose_a_node():
    while len(list((output / "masks").glob("part-*.parquet"))) < 3:
        time.sleep(0.05)
    here = ray.get_runtime_context().get_node_id()  # all are on one address, and the driver joins any of them
    cluster.remove_node(next(node for node in nodes if node.node_id != here), allow_graceful=False)
    print("lost after", len(list((output / "masks").glob("part-*.parquet"))), flush=True)


threading.Thread(target=lose_a_node, daemon=True).start()
try:
    run_command(generate_masks, "jobs.generate_masks")
finally:
    cluster.shutdown()
"""


def test_case_36_a_lost_node_costs_nothing(tmp_path: Path, tiny_checkpoint: Path) -> None:
    folder = write_jpegs(tmp_path / "in", 60)
    flags = ["--images", folder, "--output", tmp_path / "out", "--checkpoint", tiny_checkpoint, *KEEP_ALL]
    done = subprocess.run(
        [sys.executable, "-c", LOST_NODE, *map(str, flags), "--images-per-shard", "3", "--cpus-per-worker", "1"],
        check=False,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env=os.environ,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split("lost after")[1].split()[0]) < 20
    assert summary_of(tmp_path / "out")["ok"] == 60
    config = MasksConfig(
        images=folder.as_uri(),
        output=(tmp_path / "undisturbed").as_uri(),
        images_per_shard=3,
        amg=AmgConfig(points_per_side=2, pred_iou_thresh=-10, stability_score_thresh=0, box_nms_thresh=1),
    )
    make_dataset(config, tiny_checkpoint)
    assert rows(tmp_path / "out") == rows(tmp_path / "undisturbed")
