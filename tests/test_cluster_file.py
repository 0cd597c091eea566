"""`ray-cluster.yaml` and its siblings, checked without a cloud: Ray takes them, and they say what they claim."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.instance_manager.subscribers.cloud_resource_monitor import CloudResourceMonitor
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.instance_manager_pb2 import Instance, InstanceUpdateEvent

ROOT = Path(__file__).parent.parent
FILES = {"aws": "ray-cluster.yaml", "gcp": "deploy/gcp.yaml", "azure": "deploy/azure.yaml"}
EXTRAS = {"aws": "s3", "gcp": "gcs", "azure": "azure"}


def read(cloud: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((ROOT / FILES[cloud]).read_text())
    return document


@pytest.fixture(name="cloud", params=FILES)
def each_cloud(request: pytest.FixtureRequest) -> str:
    cloud: str = request.param
    return cloud


@pytest.fixture(name="cluster")
def prepared_cluster(cloud: str) -> dict[str, Any]:
    """The file as Ray sees it, with its defaults filled in."""
    prepared: dict[str, Any] = prepare_config(read(cloud))
    validate_config(prepared)
    return prepared


def head(cluster: dict[str, Any]) -> dict[str, Any]:
    node_type: dict[str, Any] = cluster["available_node_types"][cluster["head_node_type"]]
    return node_type


def workers(cluster: dict[str, Any]) -> dict[str, dict[str, Any]]:
    types: dict[str, dict[str, Any]] = cluster["available_node_types"]
    return {name: node_type for name, node_type in types.items() if name != cluster["head_node_type"]}


def is_spot(node_type: dict[str, Any]) -> bool:
    config = node_type["node_config"]
    return (
        config.get("InstanceMarketOptions") == {"MarketType": "spot"}
        or config.get("scheduling", [{}])[0].get("provisioningModel") == "SPOT"
        or config.get("azure_arm_parameters", {}).get("priority") == "Spot"
    )


def test_each_is_of_its_cloud(cluster: dict[str, Any], cloud: str) -> None:
    assert cluster["provider"]["type"] == cloud
    deployed = {f"deploy/{path.name}" for path in (ROOT / "deploy").glob("*.yaml")}
    assert deployed | {"ray-cluster.yaml"} == set(FILES.values())


def test_ray_refuses_a_misspelt_key(cloud: str) -> None:
    """What `validate_config` is worth: it does not accept just anything."""
    cluster = read(cloud)
    cluster["idle_timeout_minuts"] = cluster.pop("idle_timeout_minutes")
    with pytest.raises(Exception, match="idle_timeout_minuts"):
        validate_config(prepare_config(cluster))


def test_the_head_has_no_gpu_and_takes_no_work(cluster: dict[str, Any]) -> None:
    assert head(cluster)["resources"] == {"CPU": 0}
    assert (head(cluster)["min_workers"], head(cluster)["max_workers"]) == (0, 0)
    assert not is_spot(head(cluster)), "a reclaimed head ends the job"
    machine = machine_of(head(cluster))
    assert not re.match(r"[gp]\d|g2|a\d|Standard_N", machine), machine


def machine_of(node_type: dict[str, Any]) -> str:
    config = node_type["node_config"]
    machine: str = (
        config.get("InstanceType") or config.get("machineType") or config["azure_arm_parameters"]["vmSize"]
    )
    return machine


def test_workers_have_a_gpu(cluster: dict[str, Any]) -> None:
    for name, worker in workers(cluster).items():
        assert worker["resources"] == {"CPU": 4, "GPU": 1}, name
        assert machine_of(worker) in {"g6.xlarge", "g5.xlarge", "g2-standard-4", "Standard_NC4as_T4_v3"}, name


def test_most_workers_are_spot_and_some_are_not(cluster: dict[str, Any]) -> None:
    spot = [worker for worker in workers(cluster).values() if is_spot(worker)]
    on_demand = [worker for worker in workers(cluster).values() if not is_spot(worker)]
    assert sum(worker["max_workers"] for worker in spot) == 6
    assert [worker["max_workers"] for worker in on_demand] == [2]
    assert all(worker["priority"] > on_demand[0]["priority"] for worker in spot)
    assert cluster["max_workers"] == 8


def asked_for(cloud: str, machines: int, availabilities: dict[str, float]) -> dict[str, int]:
    """What Ray's autoscaler would start for so many workers of one GPU, by type."""
    config = AutoscalingConfig(prepare_config(read(cloud) | {"upscaling_speed": 100}), skip_content_hash=True)
    worker = ResourceRequestUtil.make({"GPU": 1, "CPU": 1})
    reply = ResourceDemandScheduler().schedule(
        SchedulingRequest(
            node_type_configs=config.get_node_type_configs(),
            max_num_nodes=config.get_max_num_worker_nodes(),
            resource_requests=ResourceRequestUtil.group_by_count([worker] * machines),
            disable_launch_config_check=True,
            recoverable_resource_availabilities=availabilities,
        )
    )
    return {launch.instance_type: launch.count for launch in reply.to_launch}


@pytest.mark.parametrize(
    ("machines", "expected"),
    [
        (3, {"aws": {"gpu-g6": 3}, "gcp": {"gpu-spot": 3}, "azure": {"gpu-spot": 3}}),
        (
            8,
            {
                "aws": {"gpu-g6": 4, "gpu-g5": 2, "gpu-g6-on-demand": 2},
                "gcp": {"gpu-spot": 6, "gpu-on-demand": 2},
                "azure": {"gpu-spot": 6, "gpu-on-demand": 2},
            },
        ),
    ],
)
def test_ray_fills_spot_first(cloud: str, machines: int, expected: dict[str, dict[str, int]]) -> None:
    assert asked_for(cloud, machines, {}) == expected[cloud]


def test_ray_does_not_turn_away_from_what_is_sold_out_but_from_what_never_comes() -> None:
    """Why no type may have all machines. Where this fails, Ray has learned it, and the files may say more."""
    monitor = CloudResourceMonitor()
    sold_out = InstanceUpdateEvent(instance_type="gpu-g6", new_instance_status=Instance.ALLOCATION_FAILED)
    monitor.notify([sold_out])
    assert monitor.get_recoverable_resource_availabilities() == {}
    never_comes = InstanceUpdateEvent(instance_type="gpu-g6", new_instance_status=Instance.ALLOCATION_TIMEOUT)
    monitor.notify([never_comes])
    availabilities = monitor.get_recoverable_resource_availabilities()
    assert asked_for("aws", 2, availabilities) == {"gpu-g5": 2}


def test_workers_come_with_work_and_go_without(cluster: dict[str, Any]) -> None:
    for name, worker in workers(cluster).items():
        assert worker["min_workers"] == 0, name
    assert 1 <= cluster["idle_timeout_minutes"] <= 30
    assert cluster["provider"]["cache_stopped_nodes"] is False


def test_all_machines_have_the_same_image(cluster: dict[str, Any]) -> None:
    """Ray refuses a node whose Python is another."""
    images = set()
    for node_type in cluster["available_node_types"].values():
        config = node_type["node_config"]
        disks = [disk["initializeParams"]["sourceImage"] for disk in config.get("disks", [])]
        parameters = config.get("azure_arm_parameters", {})
        azure = [value for key, value in sorted(parameters.items()) if key.startswith("image")]
        images.add((config.get("ImageId"), *disks, *azure))
    assert len(images) == 1
    assert any(images.pop())


def test_machines_reach_the_bucket_by_role(cluster: dict[str, Any], cloud: str) -> None:
    provider = cluster["provider"]
    for name, node_type in workers(cluster).items():
        config = node_type["node_config"]
        role = {
            "aws": config.get("IamInstanceProfile"),
            "gcp": config.get("serviceAccounts"),
            "azure": provider.get("msi_name") and provider.get("msi_resource_group"),
        }
        assert role[cloud], name


@pytest.mark.parametrize("cloud", ["azure"], indirect=True)
def test_azure_knows_each_parameter(cluster: dict[str, Any]) -> None:
    template = Path(ray.autoscaler.__file__).parent / "_private/_azure/azure-vm-template.json"
    known = set(json.loads(template.read_text())["parameters"])
    for name, node_type in cluster["available_node_types"].items():
        assert set(node_type["node_config"]["azure_arm_parameters"]) <= known, name


def test_what_is_copied_is_there_and_holds_all_packages(cluster: dict[str, Any]) -> None:
    local_paths = set(cluster["file_mounts"].values())
    assert all((ROOT / path).exists() for path in local_paths)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {name.partition(".")[0] for name in project["tool"]["setuptools"]["packages"]}
    needed = packages | {"pyproject.toml", "constraints.txt", project["project"]["readme"]}
    needed |= set(project["project"]["license-files"])
    assert local_paths == needed


def test_setup_installs_the_project_and_nothing_of_other_versions(cluster: dict[str, Any], cloud: str) -> None:
    for kind in ("head_setup_commands", "worker_setup_commands"):
        installs = [command for command in cluster[kind] if re.search(r"pip install", command)]
        assert len(installs) == 1
        assert f"--constraint constraints.txt '.[{EXTRAS[cloud]}]'" in installs[0]


def test_setup_fetches_the_weights_before_ray_starts(cluster: dict[str, Any]) -> None:
    for kind in ("head_setup_commands", "worker_setup_commands"):
        [script] = re.findall(r'bin/python -c "(.*)"', cluster[kind][-1])
        compile(script, kind, "exec")
        assert script == "from pipeline.model import load_model; load_model('mobile_sam', 'cpu')"


def test_ray_starts_as_a_cluster_whose_dashboard_only_the_head_reaches(cluster: dict[str, Any]) -> None:
    start_head = " ".join(cluster["head_start_ray_commands"])
    start_worker = " ".join(cluster["worker_start_ray_commands"])
    assert "ray start --head" in start_head
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in start_head
    assert "--dashboard-host" not in start_head
    assert "ray start --address=$RAY_HEAD_IP:6379" in start_worker
    for start in (start_head, start_worker):
        assert re.search(r"--object-store-memory=\d+\b", start), "by default it is 30 % of the memory"


def test_azure_is_not_read_as_a_stranger(cloud: str, cluster: dict[str, Any]) -> None:
    told = "AZURE_STORAGE_ANON=false"
    starts = (*cluster["head_start_ray_commands"], *cluster["worker_start_ray_commands"])
    assert all((told in start) == (cloud == "azure") for start in starts if "ray start" in start)
