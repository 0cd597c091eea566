"""`ray-cluster.yaml`, checked without a cloud: Ray takes it, and it says what the README says of it."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parent.parent


@pytest.fixture(name="cluster")
def prepared_cluster() -> dict[str, Any]:
    """The file as Ray sees it, with its defaults filled in."""
    prepared: dict[str, Any] = prepare_config(yaml.safe_load((ROOT / "ray-cluster.yaml").read_text()))
    validate_config(prepared)
    return prepared


def head(cluster: dict[str, Any]) -> dict[str, Any]:
    node_type: dict[str, Any] = cluster["available_node_types"][cluster["head_node_type"]]
    return node_type


def workers(cluster: dict[str, Any]) -> dict[str, dict[str, Any]]:
    types: dict[str, dict[str, Any]] = cluster["available_node_types"]
    return {name: node_type for name, node_type in types.items() if name != cluster["head_node_type"]}


def test_ray_refuses_a_misspelt_key() -> None:
    """What `validate_config` is worth: it does not accept just anything."""
    cluster = yaml.safe_load((ROOT / "ray-cluster.yaml").read_text())
    cluster["idle_timeout_minuts"] = cluster.pop("idle_timeout_minutes")
    with pytest.raises(Exception, match="idle_timeout_minuts"):
        validate_config(prepare_config(cluster))


def test_the_head_has_no_gpu_and_takes_no_work(cluster: dict[str, Any]) -> None:
    assert head(cluster)["resources"] == {"CPU": 0}
    assert (head(cluster)["min_workers"], head(cluster)["max_workers"]) == (0, 0)
    assert not head(cluster)["node_config"]["InstanceType"].startswith(("g", "p"))
    assert "InstanceMarketOptions" not in head(cluster)["node_config"], "a reclaimed head ends the job"


def test_workers_are_spot_machines_with_a_gpu(cluster: dict[str, Any]) -> None:
    assert workers(cluster)
    for name, worker in workers(cluster).items():
        assert worker["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot", name
        assert worker["resources"]["GPU"] >= 1, name
        assert worker["node_config"]["InstanceType"].startswith(("g", "p")), name


def test_workers_come_with_work_and_go_without(cluster: dict[str, Any]) -> None:
    for name, worker in workers(cluster).items():
        assert worker["min_workers"] == 0, name
        assert 1 <= worker["max_workers"] <= cluster["max_workers"], name
    assert 1 <= cluster["idle_timeout_minutes"] <= 30
    assert cluster["provider"]["cache_stopped_nodes"] is False


def test_all_machines_have_the_same_image(cluster: dict[str, Any]) -> None:
    """Ray refuses a node whose Python is another."""
    images = {node_type["node_config"]["ImageId"] for node_type in cluster["available_node_types"].values()}
    assert len(images) == 1


def test_machines_reach_the_bucket_by_role(cluster: dict[str, Any]) -> None:
    for name, node_type in cluster["available_node_types"].items():
        assert node_type["node_config"]["IamInstanceProfile"]["Name"], name


def test_what_is_copied_is_there_and_holds_all_packages(cluster: dict[str, Any]) -> None:
    local_paths = set(cluster["file_mounts"].values())
    assert all((ROOT / path).exists() for path in local_paths)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {name.partition(".")[0] for name in project["tool"]["setuptools"]["packages"]}
    needed = packages | {"pyproject.toml", "constraints.txt", project["project"]["readme"]}
    needed |= set(project["project"]["license-files"])
    assert local_paths == needed


def test_setup_installs_the_project_and_nothing_of_other_versions(cluster: dict[str, Any]) -> None:
    for kind in ("head_setup_commands", "worker_setup_commands"):
        installs = [command for command in cluster[kind] if re.search(r"pip install", command)]
        assert len(installs) == 1
        assert "--constraint constraints.txt '.[s3]'" in installs[0]


def test_ray_starts_as_a_cluster_whose_dashboard_only_the_head_reaches(cluster: dict[str, Any]) -> None:
    start_head = " ".join(cluster["head_start_ray_commands"])
    start_worker = " ".join(cluster["worker_start_ray_commands"])
    assert "ray start --head" in start_head
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in start_head
    assert "--dashboard-host" not in start_head
    assert "ray start --address=$RAY_HEAD_IP:6379" in start_worker
