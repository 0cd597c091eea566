"""$RAY_ADDRESS: what it may say, and a cluster that does not answer."""

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import grpc
import numpy as np
import pytest
import ray
from PIL import Image
from ray._private import services
from running import call

from pipeline import cluster, engine
from pipeline.cluster import check_answers, cluster_address
from pipeline.errors import ClusterError


@pytest.fixture(autouse=True)
def _loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray takes 127.0.0.1 for this machine's address in its network, where nothing of these tests listens."""
    monkeypatch.setattr(services, "resolve_ip_for_localhost", lambda host: host)


@pytest.fixture
def closed_port() -> Iterator[int]:
    """Of a socket that does not listen, so that nothing else takes it meanwhile."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@pytest.mark.parametrize("local", [None, "", " ", "local"])
def test_without_an_address_ray_is_local(local: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert cluster_address() == "head:6379"
    if local is None:
        monkeypatch.delenv("RAY_ADDRESS")
    else:
        monkeypatch.setenv("RAY_ADDRESS", local)
    assert cluster_address() is None
    check_answers()


@pytest.mark.parametrize("address", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "auto"])
def test_where_nothing_listens_is_said_within_ten_seconds(
    address: str, closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address.format(closed_port))
    monkeypatch.setattr(services, "find_gcs_addresses", set)
    monkeypatch.setattr(services, "find_bootstrap_address", lambda _: f"127.0.0.1:{closed_port}")  # of a dead head
    if address != "auto":
        monkeypatch.setattr(cluster, "_ANSWER_SECONDS", 0.5)
    start = time.monotonic()
    with pytest.raises(
        ClusterError, match=rf"(?s)answers at 127\.0\.0\.1:{closed_port}.*RAY_ADDRESS={address[:4]}"
    ):
        check_answers()
    assert time.monotonic() - start < 30  # ten where nothing else runs; Ray itself would try for minutes


def test_a_web_server_as_the_dashboard_is_no_head(monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.server_port}")
        monkeypatch.setattr(cluster, "_ANSWER_SECONDS", 0.5)
        with pytest.raises(ClusterError, match="8265 is the dashboard's"):
            check_answers()
        server.shutdown()


@pytest.mark.parametrize("address", ["127.0.0.1:{}", "ray://127.0.0.1:{}?namespace=n", "auto"])
def test_what_answers_is_let_through(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        monkeypatch.setenv("RAY_ADDRESS", address.format(port))
        monkeypatch.setattr(services, "find_bootstrap_address", lambda _: f"127.0.0.1:{port}")
        check_answers()
        server.stop(None)


@pytest.mark.parametrize(("variable", "value"), [("RAY_USE_TLS", "1"), ("RAY_ADDRESS", "other://service")])
def test_what_cannot_be_asked_is_let_through(
    variable: str, value: str, closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{closed_port}")
    monkeypatch.setenv(variable, value)
    check_answers()


@pytest.mark.parametrize("address", ["nonsense", "auto"])
def test_no_address_at_all_is_said(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(services, "find_gcs_addresses", set)
    monkeypatch.setattr(services, "find_bootstrap_address", lambda _: None)
    with pytest.raises(ClusterError, match=f"RAY_ADDRESS={address} leads to no Ray cluster"):
        check_answers()


@pytest.mark.parametrize(
    ("address", "what"), [("", "started on this machine"), ("other://a", "connected to at RAY_ADDRESS=other://a")]
)
def test_a_ray_that_does_not_start_is_an_error_of_ours(
    address: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise Exception("first line\nThe current node timed out during startup.")  # noqa: TRY002 (as Ray's own)

    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(ray, "init", fails)
    with (
        pytest.raises(ClusterError, match=f"^Ray could not be {what}: The current node timed out"),
        engine.connected(),
    ):
        pass


@pytest.mark.parametrize("further", [[], ["--dry-run"]])
def test_a_run_on_no_cluster_ends_before_anything_is_written(
    further: list[str], closed_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    flags = ["--images", tmp_path / "a.png", "--output", tmp_path / "out", "--model", "demo", *further]
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{closed_port}")
    monkeypatch.setattr(cluster, "_ANSWER_SECONDS", 0.5)
    refused = call("jobs.generate_masks", *flags)
    assert refused.returncode == 3, refused.stderr
    assert "No Ray cluster answers" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "out").exists()
