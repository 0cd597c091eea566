"""Published weights: fetched once, held to their hash, and kept in the cache."""

import hashlib
import http.server
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from small_weights import load

from pipeline.errors import CheckpointError, PreflightError
from pipeline.model import weights
from pipeline.model.weights import fetch_published
from pipeline.storage import attempts


@dataclass
class Site:
    """A web server that counts."""

    address: str
    folder: Path
    requests: list[str] = field(default_factory=list)
    disturbances: list[str] = field(default_factory=list)
    """What happens to the next requests."""


class _Handler(http.server.SimpleHTTPRequestHandler):
    requests: list[str]
    disturbances: list[str]

    def do_GET(self) -> None:
        match self.disturbances.pop(0) if self.disturbances else None:
            case "503":
                self.send_error(503)
            case "cut":
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b"half")
            case None:
                super().do_GET()

    def log_request(self, code: Any = "-", size: Any = "-") -> None:
        self.requests.append(self.path)

    def log_message(self, *arguments: Any) -> None:
        """Say nothing."""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A server on loopback and an empty cache."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.setenv("EVERYMASK_CACHE", str(tmp_path / "cache"))
    requests: list[str] = []
    disturbances: list[str] = []
    handler = type("Handler", (_Handler,), {"requests": requests, "disturbances": disturbances})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield Site(f"http://127.0.0.1:{server.server_port}", folder, requests, disturbances)
        server.shutdown()
        thread.join()


def publish(site: Site, monkeypatch: pytest.MonkeyPatch, data: bytes, sha256: str | None = None) -> None:
    """Put a file on the site and into the table of published weights, as `mobile_sam`."""
    (site.folder / "weights.pt").write_bytes(data)
    entry = weights.Published(f"{site.address}/weights.pt", sha256 or hashlib.sha256(data).hexdigest())
    monkeypatch.setitem(weights.PUBLISHED, "mobile_sam", entry)


def test_published_weights_are_fetched_once(
    site: Site, monkeypatch: pytest.MonkeyPatch, checkpoint: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    publish(site, monkeypatch, checkpoint)
    first = load("mobile_sam")
    assert "100%" in capfd.readouterr().err  # the progress bar
    second = load("mobile_sam")
    assert first.weights_sha256 == second.weights_sha256 == hashlib.sha256(checkpoint).hexdigest()
    assert site.requests == ["/weights.pt"]


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: data[:-1] + b"?", lambda data: b""])
def test_damaged_cache_is_fetched_again(
    damage: Callable[[bytes], bytes], site: Site, monkeypatch: pytest.MonkeyPatch, checkpoint: bytes
) -> None:
    publish(site, monkeypatch, checkpoint)
    path = fetch_published("mobile_sam")
    path.write_bytes(damage(checkpoint))
    assert fetch_published("mobile_sam").read_bytes() == checkpoint
    assert len(site.requests) == 2


@pytest.mark.parametrize("content", ["checkpoint", "html"])
def test_case_42_published_weights_of_another_hash_are_refused(
    content: str, site: Site, monkeypatch: pytest.MonkeyPatch, checkpoint: bytes
) -> None:
    data = checkpoint if content == "checkpoint" else b"<html>moved</html>"
    publish(site, monkeypatch, data, sha256=hashlib.sha256(b"another").hexdigest())
    for _ in range(2):
        with pytest.raises(CheckpointError, match="not the published file of mobile_sam"):
            load("mobile_sam")
    assert len(site.requests) == 2  # nothing wrong was kept


def test_a_download_that_is_disturbed_is_tried_again(
    site: Site, monkeypatch: pytest.MonkeyPatch, checkpoint: bytes
) -> None:
    publish(site, monkeypatch, checkpoint)
    monkeypatch.setattr(attempts, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(attempts, "JITTER_S", 0.01)
    site.disturbances += ["503", "cut", "hang up"]
    assert fetch_published("mobile_sam").read_bytes() == checkpoint
    assert site.disturbances == []
    assert len(list(Path(os.environ["EVERYMASK_CACHE"]).iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_named(
    site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    publish(site, monkeypatch, b"x")
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("EVERYMASK_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(CheckpointError, match=r"in .*/file/cache: .*\$EVERYMASK_CACHE"):
        fetch_published("mobile_sam")


def test_weights_that_cannot_be_downloaded_say_what_to_do(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(site, monkeypatch, b"x")
    (site.folder / "weights.pt").unlink()
    with pytest.raises(PreflightError, match=r"Cannot download .*/weights\.pt.*404.*--checkpoint"):
        load("mobile_sam")
