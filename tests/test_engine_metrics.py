"""A run as a real Prometheus sees it: every panel of the dashboard has data, and totals are those of the rows."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import pytest
from prometheus_client.parser import text_string_to_metric_families
from ray_heads import free_port
from running import TIMEOUT_S, rows, write_jpegs

from pipeline.config import AmgConfig, ClusterConfig, MasksConfig, ModelConfig

pytestmark = pytest.mark.alone

DASHBOARD = json.loads((Path(__file__).parents[1] / "deploy/grafana/everymask.json").read_text())
QUERIES = [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel["targets"]]
IMAGES, DAMAGED, PER_SHARD = 400, 20, 50
PROMETHEUS = shutil.which("prometheus")

# A run on a Ray that exports on a known port, and that stays until standard input ends.
ON_A_KNOWN_PORT = """
import json
import logging
import sys
from contextlib import nullcontext

from jobs import dataset, preflight, with_model
from pipeline import engine
from pipeline.config import MasksConfig
from pipeline.engine_metrics import logs_folder

ray = engine.ray
logging.basicConfig()
ray.init("local", num_cpus=2, include_dashboard=False, _metrics_export_port=int(sys.argv[1]))
run = with_model.begin(preflight.checked(MasksConfig.model_validate_json(sys.argv[2])))
dataset.finish(run, engine.make_shards, nullcontext)
known = ray.data._internal.stats.get_or_create_stats_actor().get_datasets.remote()
print(json.dumps([str(logs_folder()), ray.get(known)]), flush=True)
sys.stdin.read()
"""


class Watched(NamedTuple):
    """A finished run, and what was seen of it."""

    folder: Path
    output: Path
    name: str
    log: str
    began: float
    names: set[str]
    """Of all metrics that its node showed."""
    totals: dict[str, Counter[str]]
    """Of its counters, by reason or phase, after its end."""
    datasets: dict[str, Any]
    """What Ray's Data view knows."""
    events: list[dict[str, Any]]


def get(address: str) -> str:
    with urllib.request.urlopen(address, timeout=30) as answer:
        text: str = answer.read().decode()
        return text


def metrics_on(port: int) -> list[Any]:
    """Those of ours that a node shows; none where it does not answer yet."""
    try:
        text = get(f"http://127.0.0.1:{port}/metrics")
    except OSError:
        return []
    return [family for family in text_string_to_metric_families(text) if "everymask" in family.name]


def totals_on(port: int) -> dict[str, Counter[str]]:
    found: dict[str, Counter[str]] = {}
    for sample in (sample for family in metrics_on(port) for sample in family.samples):
        tag = sample.labels.get("reason") or sample.labels.get("phase") or ""
        found.setdefault(sample.name, Counter())[tag] += sample.value
    return found


@pytest.fixture(scope="module")
def port() -> int:
    """Where the node shows its metrics."""
    return free_port()


@pytest.fixture(scope="module")
def prometheus(port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str | None]:
    """A Prometheus that asks the node each second; None where it is not installed."""
    if PROMETHEUS is None:
        yield None
        return
    folder, own = tmp_path_factory.mktemp("prometheus"), free_port()
    (folder / "prometheus.yml").write_text(
        "global: {scrape_interval: 1s}\n"
        f"scrape_configs: [{{job_name: ray, static_configs: [{{targets: ['127.0.0.1:{port}']}}]}}]\n"
    )
    flags = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [PROMETHEUS, *flags, f"--web.listen-address=127.0.0.1:{own}"], stdout=log, stderr=subprocess.STDOUT
        )
    yield f"http://127.0.0.1:{own}"
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def watched(
    port: int, prometheus: str | None, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Watched]:
    """A run of which every twentieth image is damaged; its Ray is still there."""
    tmp_path = tmp_path_factory.mktemp("run")
    folder, output = write_jpegs(tmp_path / "in", IMAGES), tmp_path / "out"
    for path in sorted(folder.iterdir())[:: IMAGES // DAMAGED]:
        path.write_bytes(path.read_bytes()[:500])
    config = MasksConfig(
        images=str(folder),
        output=str(output),
        images_per_shard=PER_SHARD,
        model=ModelConfig(checkpoint=str(tiny_checkpoint)),
        cluster=ClusterConfig(cpus_per_worker=1),
        amg=AmgConfig(points_per_side=2, pred_iou_thresh=-10, stability_score_thresh=0, box_nms_thresh=1),
    )
    began, names = time.time(), set[str]()
    with (tmp_path / "out.json").open("w") as told, (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", ON_A_KNOWN_PORT, str(port), config.model_dump_json()],
            env=os.environ | {"RAY_metrics_report_interval_ms": "1000"},
            stdin=subprocess.PIPE,
            stdout=told,
            stderr=log,
        )
    try:
        while not (tmp_path / "out.json").read_text().endswith("\n"):
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.time() < began + TIMEOUT_S
            names |= {sample.name for family in metrics_on(port) for sample in family.samples}
            time.sleep(0.5)
        deadline = time.monotonic() + 30
        while (totals := totals_on(port))["ray_everymask_images_total"][""] < IMAGES:
            assert time.monotonic() < deadline, totals
            time.sleep(0.5)
        logs, datasets = json.loads((tmp_path / "out.json").read_text().splitlines()[-1])
        files = Path(logs).glob("everymask-*.log")
        events = [json.loads(line) for path in files for line in path.read_text().splitlines()]
        name = json.loads((output / "run.json").read_text())["fingerprint"][:12]
        text = (tmp_path / "log").read_text()
        yield Watched(folder, output, name, text, began, names, totals, datasets, events)
    finally:
        process.communicate()


def test_every_metric_of_every_panel_is_exported(watched: Watched) -> None:
    asked = {name for _, query in QUERIES for name in re.findall(r"ray_everymask_\w+", query)}
    assert len(asked) >= 10
    assert asked <= watched.names
    assert "exports no metrics" not in watched.log


@pytest.mark.skipif(PROMETHEUS is None, reason="needs prometheus: apt-get install prometheus")
def test_every_query_of_every_panel_returns_data(watched: Watched, prometheus: str) -> None:
    for title, template in QUERIES:
        query = template.replace("$run", watched.name).replace("$__rate_interval", "10s")
        span = f"start={watched.began}&end={time.time()}&step=1"
        answer = json.loads(get(f"{prometheus}/api/v1/query_range?query={quote(query)}&{span}"))
        values = [value for series in answer["data"]["result"] for _, value in series["values"]]
        assert any(value not in {"NaN", "0"} for value in values), f"{title}: {query} has {answer}"
    asked = DASHBOARD["templating"]["list"][1]["definition"]
    metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", asked).groups()  # type: ignore[union-attr]
    answer = json.loads(get(f"{prometheus}/api/v1/label/{label}/values?match[]={metric}"))
    assert answer["data"] == [watched.name]


def test_totals_are_those_of_the_rows(watched: Watched) -> None:
    found = rows(watched.output)
    totals = watched.totals
    assert totals["ray_everymask_images_total"][""] == len(found) == IMAGES
    assert totals["ray_everymask_masks_total"][""] == sum(len(row["masks"]) for row in found)
    failed = Counter(row["status"] for row in found if row["error"])
    assert totals["ray_everymask_failures_total"] == failed
    assert failed.total() == DAMAGED
    sizes = sum(path.stat().st_size for path in watched.folder.iterdir())
    assert totals["ray_everymask_bytes_read_total"][""] == sizes
    assert totals["ray_everymask_image_phase_seconds_count"] == {
        **dict.fromkeys(("fetch", "decode"), IMAGES),
        **dict.fromkeys(("encode", "decode_masks", "post_process"), IMAGES - DAMAGED),
        "write": IMAGES // PER_SHARD,
    }
    assert all(seconds > 0 for seconds in totals["ray_everymask_phase_seconds_total"].values())


def test_the_data_view_names_the_run_and_its_workers(watched: Watched) -> None:
    [(dataset, known)] = watched.datasets.items()
    assert dataset.startswith(f"everymask_masks_{watched.name}_")
    assert any("ShardWorker" in operator for operator in known["operators"])


def test_each_phase_of_each_shard_is_an_event(watched: Watched) -> None:
    assert {event["run"] for event in watched.events} == {watched.name}
    told = Counter((event["shard"], event["phase"]) for event in watched.events)
    phases = ("fetch", "decode", "encode", "decode_masks", "post_process", "write")
    assert told == {(shard, phase): 1 for shard in range(IMAGES // PER_SHARD) for phase in phases}
    images = Counter[str]()
    for event in watched.events:
        images[event["phase"]] += event["images"]
    assert (images["fetch"], images["encode"], images["write"]) == (IMAGES, IMAGES - DAMAGED, IMAGES)
