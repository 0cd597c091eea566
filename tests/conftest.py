"""Fixtures that several test modules share."""

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from faulty_proxy import FaultyProxy, faulty_proxy
from ray_heads import one_machine
from s3server import S3Server, run_s3_server
from small_distillation import SIZE, write_store

from jobs.seeded_checkpoint import seeded_checkpoint
from pipeline.model.sam import SamModel
from pipeline.model.weights import checkpoint_bytes, seeded_model
from pipeline.storage import s3

C_LIBRARY: Final = ctypes.CDLL(None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put those first that take long."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(autouse=True)
def _give_memory_back() -> Iterator[None]:
    """What a test leaves free may not fit the next: a C library that is set to keep it would only take more."""
    yield
    if hasattr(C_LIBRARY, "malloc_trim"):  # glibc's
        C_LIBRARY.malloc_trim(0)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server, with the environment that leads s3fs to it, also in subprocesses."""
    with (
        run_s3_server(tmp_path_factory.mktemp("s3")) as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory, s3_server: S3Server) -> Iterator[dict[str, str]]:
    """A Ray cluster that reaches the S3 server, as the environment that leads commands to it."""
    with one_machine(tmp_path_factory.mktemp("cluster")) as environment:
        yield environment


@pytest.fixture(scope="module")
def proxy(s3_server: S3Server) -> Iterator[FaultyProxy]:
    """A proxy before the S3 server, to which S3's client is led."""
    with faulty_proxy(s3_server.endpoint) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        s3.client.cache_clear()
        yield proxy
    s3.client.cache_clear()


@pytest.fixture
def bucket(s3_server: S3Server) -> str:
    """`s3://NAME` of a new, empty bucket."""
    return s3_server.make_bucket()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained MobileSAM for 64 x 64 pixels, which takes milliseconds a picture."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    seeded_checkpoint(output=str(path), seed=0, image_size=64)
    return path


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained teacher for 64 x 64 pixels."""
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    seeded_checkpoint(output=str(path), seed=5, image_size=SIZE)
    return path


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    """A store of 22 images in 6 shards, which no test changes."""
    return write_store(tmp_path_factory.mktemp("shared"), "store", teacher)


@pytest.fixture
def store(tmp_path: Path, teacher: Path) -> Path:
    """The same, for tests that change it; its pictures are in `store-pictures` beside it."""
    return write_store(tmp_path, "store", teacher)


@pytest.fixture(scope="module")
def model() -> SamModel:
    """An untrained model for 64 x 64 pixels."""
    return seeded_model(3, 64)


@pytest.fixture(scope="module")
def checkpoint(model: SamModel) -> bytes:
    """The bytes of its own file."""
    return checkpoint_bytes(model, {"image_size": 64})
