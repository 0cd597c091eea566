"""`deploy/kuberay/`, checked without a Kubernetes cluster: KubeRay takes it, and it says what it claims.

`kuberay_schemas.json.gz` holds KubeRay's own schemas, which embed those of pods, and says where they are from.
What KubeRay checks by rules (`x-kubernetes-validations`) and in its operator is not checked here.
"""

import gzip
import json
import re
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator, ValidationError

ROOT = Path(__file__).parent.parent
MANIFESTS = sorted((ROOT / "deploy" / "kuberay").glob("*.yaml"))


def strict(schema: Any) -> Any:
    """A CRD's schema as JSON Schema in which unknown fields are errors; Kubernetes drops them without a word."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    schema = {key: strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        schema.setdefault("additionalProperties", False)
    return schema


@pytest.fixture(scope="module", name="schemas")
def strict_schemas() -> dict[str, Any]:
    document = json.loads(gzip.decompress((Path(__file__).parent / "kuberay_schemas.json.gz").read_bytes()))
    return {kind: strict(schema) for kind, schema in document["schemas"].items()}


def validate(manifest: dict[str, Any], schemas: dict[str, Any]) -> None:
    schema = schemas[manifest["kind"]]
    schema["properties"]["metadata"] = {
        "type": "object",
        "required": ["name"],
        "properties": {"name": {"type": "string", "pattern": "^[a-z0-9-]{1,47}$"}},
        "additionalProperties": False,
    }
    Draft202012Validator(schema).validate(manifest)


def load(name: str) -> dict[str, Any]:
    manifest: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "kuberay" / name).read_text())
    return manifest


@pytest.fixture(name="cluster")
def cluster_spec() -> dict[str, Any]:
    spec: dict[str, Any] = load("raycluster.yaml")["spec"]
    return spec


def groups(cluster: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {group["groupName"]: group for group in cluster["workerGroupSpecs"]}


def container(group: dict[str, Any]) -> dict[str, Any]:
    [one] = group["template"]["spec"]["containers"]
    assert isinstance(one, dict)
    return one


def test_both_are_there() -> None:
    assert [path.name for path in MANIFESTS] == ["raycluster.yaml", "rayjob.yaml"]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_kuberay_takes_it(path: Path, schemas: dict[str, Any]) -> None:
    manifest = yaml.safe_load(path.read_text())
    assert manifest["apiVersion"] == "ray.io/v1"
    validate(manifest, schemas)


@pytest.mark.parametrize(
    ("where", "wrong", "said"),
    [
        ("spec backofLimit", 3, "backofLimit"),
        ("spec backoffLimit", "3", "is not of type 'integer'"),
        ("spec rayClusterSpec workerGroupSpecs 0 maxReplica", 1, "maxReplica"),
        ("spec rayClusterSpec workerGroupSpecs 0 template spec tolerations 0 efect", "NoSchedule", "efect"),
        ("spec rayClusterSpec headGroupSpec template spec containers 0 image", 5, "is not of type 'string'"),
        ("spec rayClusterSpec headGroupSpec template spec volumes 0 emptyDir size", "1Gi", "size"),
    ],
)
def test_what_is_misspelt_is_refused(where: str, wrong: Any, said: str, schemas: dict[str, Any]) -> None:
    manifest = json.loads(json.dumps(load("rayjob.yaml")))  # without what YAML's anchors share
    *path, last = where.split()
    place = manifest
    for key in path:
        place = place[int(key) if key.isdigit() else key]
    place[last] = wrong
    with pytest.raises(ValidationError, match=said):
        validate(manifest, schemas)


def test_the_job_has_the_same_cluster(cluster: dict[str, Any]) -> None:
    assert load("rayjob.yaml")["spec"]["rayClusterSpec"] == cluster


def test_ray_is_the_version_that_the_image_has(cluster: dict[str, Any]) -> None:
    assert f"ray=={cluster['rayVersion']}\n" in (ROOT / "constraints.txt").read_text()
    assert cluster["rayVersion"] == version("ray")


def test_the_job_is_submitted_again_and_its_cluster_goes_with_it(cluster: dict[str, Any]) -> None:
    spec = load("rayjob.yaml")["spec"]
    assert 1 <= spec["backoffLimit"] <= 5
    assert spec["shutdownAfterJobFinishes"] is True
    words = shlex.split(spec["entrypoint"])
    assert words[:3] == ["python", "-m", "jobs.generate_masks"]
    assert "--overwrite" not in words, "each new submission would start anew"
    assert words[words.index("--device") + 1] == "cuda"
    most = groups(cluster)["gpu-spot"]["maxReplicas"]
    assert int(words[words.index("--num-workers") + 1]) == most


def test_the_head_takes_no_work_and_no_spot_node(cluster: dict[str, Any]) -> None:
    head = cluster["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert "tolerations" not in head["template"]["spec"]
    assert "nvidia.com/gpu" not in container(head)["resources"]["limits"]


def test_workers_come_with_work_and_spot_is_preferred(cluster: dict[str, Any]) -> None:
    spot, on_demand = groups(cluster)["gpu-spot"], groups(cluster)["gpu-on-demand"]
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["version"] == "v2", "priorities and the memory of failures are version 2's"
    assert spot["priority"] > on_demand["priority"]
    for group in (spot, on_demand):
        assert (group["replicas"], group["minReplicas"]) == (0, 0)
        assert group["maxReplicas"] >= 1
        limits, requests = (container(group)["resources"][kind] for kind in ("limits", "requests"))
        assert limits["nvidia.com/gpu"] == requests["nvidia.com/gpu"] == "1"
        assert limits["memory"] == requests["memory"], (
            "the kernel would end a worker where the node's memory runs out"
        )
    tolerated = {toleration["key"] for toleration in spot["template"]["spec"]["tolerations"]}
    assert tolerated == {"cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority", "nvidia.com/gpu"}
    assert [toleration["key"] for toleration in on_demand["template"]["spec"]["tolerations"]] == ["nvidia.com/gpu"]
    assert not on_demand["template"]["spec"]["nodeSelector"]


def test_ray_has_room_in_shared_memory(cluster: dict[str, Any]) -> None:
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        [mount] = container(group)["volumeMounts"]
        [volume] = group["template"]["spec"]["volumes"]
        assert mount == {"name": volume["name"], "mountPath": "/dev/shm"}
        assert volume["emptyDir"]["medium"] == "Memory"
        room = int(volume["emptyDir"]["sizeLimit"].removesuffix("Mi")) * 2**20
        assert int(group["rayStartParams"]["object-store-memory"]) * 1.25 < room


def test_workers_are_told_in_time(cluster: dict[str, Any]) -> None:
    """The hook takes less than the pod has, on GKE's spot nodes 15 seconds."""
    for group in cluster["workerGroupSpecs"]:
        command = container(group)["lifecycle"]["preStop"]["exec"]["command"]
        assert command[:2] == ["/bin/bash", "-c"]
        waits = [int(seconds) for seconds in re.findall(r"sleep (\d+)", command[2])]
        assert sum(waits) < 15 <= group["template"]["spec"]["terminationGracePeriodSeconds"]
        patterns = re.findall(r"pkill -TERM -f '([^']+)'", command[2])
        itself = " ".join(command)
        assert not any(re.search(pattern, itself) for pattern in patterns), "the hook would end itself"
        assert re.search(patterns[0], "/usr/local/bin/python /usr/local/bin/ray start --address=x --block")
        assert re.search(patterns[1], "ray::MapWorker(MapBatches(ShardWorker)).submit")


def test_no_secret_and_no_root(cluster: dict[str, Any]) -> None:
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert group["template"]["spec"]["securityContext"]["runAsNonRoot"] is True
        assert container(group)["securityContext"]["allowPrivilegeEscalation"] is False
        for variable in container(group)["env"]:
            assert "value" not in variable
            assert variable["valueFrom"]["secretKeyRef"]["name"] == "everymask-storage"
