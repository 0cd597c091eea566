"""Storage on local disk, on a real S3 server, and in memory: addresses, reading and writing."""

import io
import os
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.fs
import pytest

from pipeline import storage
from pipeline.errors import StorageError

# Addresses


def test_local_paths_become_file_uris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.canonical_uri("a b#%20.jpg") == f"file://{tmp_path}/a b#%20.jpg"
    assert storage.canonical_uri(f"{tmp_path}/x/../y/") == f"file://{tmp_path}/y"
    assert storage.canonical_uri(f"file://{tmp_path}/y") == f"file://{tmp_path}/y"
    assert storage.canonical_uri("/") == "file:///"


def test_other_uris_keep_everything_but_slashes_at_the_end() -> None:
    assert storage.canonical_uri("s3://b/a//b%20#?x/") == "s3://b/a//b%20#?x"
    assert storage.canonical_uri("https://h/p/?q=1/") == "https://h/p/?q=1/"


@pytest.mark.parametrize(
    ("uri", "listed", "inside"),
    [
        ("s3://b/in/out", "s3://b/in", True),
        ("s3://b/in", "s3://b/in/", True),
        ("s3://b/in-masks", "s3://b/in", False),
        ("s3://b/out", "s3://b", True),
        ("s3a://b/in/out", "s3://b/in", True),
        ("s3://b/in/out", "s3a://b/in", True),
        ("gcs://b/in/out", "gs://b/in", True),
        ("gs://b/in/out", "s3://b/in", False),
        ("/data/out", "/", True),
        ("/data/out", "/data/in", False),
        ("s3://b/in/out", "s3://b/in/*.jpg", True),
        ("s3://b/2024-masks", "s3://b/2024-*/**/*.jpg", True),
        ("s3://b/masks", "s3://b/2024-*/**/*.jpg", False),
        ("s3://b/out", "s3://b/**", True),
        ("/data/out", "/*.jpg", True),
        ("https://h/in/out", "https://h/in?x=1", False),
    ],
)
def test_case_30_inside(uri: str, listed: str, inside: bool) -> None:
    assert storage.is_inside(uri, listed) is inside


def test_case_30_inside_by_a_link(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "in")
    assert storage.is_inside(str(tmp_path / "link/out"), str(tmp_path / "in"))
    assert storage.is_inside(str(tmp_path / "in/out"), str(tmp_path / "link"))
    assert storage.is_inside(str(tmp_path / "link/out"), str(tmp_path / "in/*.jpg"))


# Reading and writing


@pytest.fixture(params=["disk", "s3", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder on each kind of store."""
    if request.param == "s3":
        return str(request.getfixturevalue("bucket")) + "/folder"
    return f"memory://{tmp_path}" if request.param == "memory" else f"file://{tmp_path}"


def test_a_file_lives_and_dies(folder: str) -> None:
    uri = f"{folder}/sub/x.bin"
    assert not storage.exists(uri)
    storage.write_atomic(uri, b"0123456789")
    assert storage.exists(uri)
    assert not storage.exists(f"{folder}/sub")
    assert storage.stat(uri)[:2] == (uri, 10)  # type: ignore[index]
    assert [file.uri for file in storage.list_files(folder)] == [uri]
    assert list(storage.list_names(f"{folder}/sub")) == ["x.bin"]
    storage.write_atomic(uri, b"new")
    assert storage.read_bytes(uri) == b"new"
    storage.delete(uri)
    storage.delete(uri)
    assert not storage.exists(uri)
    with pytest.raises(StorageError, match="bin"):
        storage.read_bytes(uri)


def test_ranges(folder: str) -> None:
    storage.write_atomic(f"{folder}/x", b"0123456789")
    storage.write_atomic(f"{folder}/empty", b"")
    assert storage.read_bytes(f"{folder}/x", 2, 3) == b"234"
    assert storage.read_bytes(f"{folder}/x", 7) == b"789"
    assert storage.read_bytes(f"{folder}/x", 7, 100) == b"789"
    assert storage.read_bytes(f"{folder}/x", 100, 5) == b""
    assert storage.read_bytes(f"{folder}/x", 3, 0) == b""
    assert storage.read_bytes(f"{folder}/empty") == b""
    assert storage.read_bytes(f"{folder}/empty", 0, 5) == b""


def test_open_input_seeks(folder: str) -> None:
    data = os.urandom(1_000_000)
    storage.write_atomic(f"{folder}/x", data)
    with storage.open_input(f"{folder}/x") as file:
        file.seek(-10, os.SEEK_END)
        assert file.read() == data[-10:]
        file.seek(123_456)
        assert file.read(700_000) == data[123_456:823_456]
        file.seek(2_000_000)
        assert file.read(1) == b""


def test_case_29_another_version_on_s3(bucket: str) -> None:
    storage.write_atomic(f"{bucket}/x", b"one")
    etag = next(storage.list_files(bucket)).etag
    assert etag is not None
    assert storage.read_bytes(f"{bucket}/x", etag=etag) == b"one"
    storage.write_atomic(f"{bucket}/x", b"two")
    with pytest.raises(storage.ChangedError, match=f"{bucket}/x has changed"):
        storage.read_bytes(f"{bucket}/x", etag=etag)


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    storage.write_atomic(str(tmp_path / "x"), b"old")
    with pytest.raises(StorageError):
        storage.write_atomic(str(tmp_path / "x"), None)  # type: ignore[arg-type]
    assert (tmp_path / "x").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]  # noqa: PTH208


def test_a_file_is_written_from_its_beginning(folder: str) -> None:
    data = os.urandom(300_000)
    with tempfile.SpooledTemporaryFile(1000) as file:
        file.write(data)
        storage.write_atomic(f"{folder}/x", file)
    assert storage.read_bytes(f"{folder}/x") == data


def test_readers_never_see_half_a_file(folder: str) -> None:
    versions = [bytes([i]) * 300_000 for i in range(20)]
    storage.write_atomic(f"{folder}/x", versions[0])
    writer = threading.Thread(target=lambda: [storage.write_atomic(f"{folder}/x", data) for data in versions])
    writer.start()
    while writer.is_alive():
        assert storage.read_bytes(f"{folder}/x") in versions
    writer.join()


def test_threads_share_the_client(bucket: str) -> None:
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda i: storage.write_atomic(f"{bucket}/{i}", str(i).encode()), range(64)))
        assert list(pool.map(lambda i: storage.read_bytes(f"{bucket}/{i}"), range(64))) == [
            str(i).encode() for i in range(64)
        ]


def test_arrows_filesystem_reads_and_refuses_the_rest(tmp_path: Path) -> None:
    uri = f"memory://{tmp_path}/x"
    storage.write_atomic(uri, b"abc")
    filesystem, path = storage.arrow_filesystem(uri)
    assert filesystem.open_input_file(path).read() == b"abc"
    for refused in (filesystem.delete_file, filesystem.create_dir, filesystem.open_output_stream):
        with pytest.raises(io.UnsupportedOperation, match="opens files to read, and does nothing else"):
            refused(path)
    assert storage.read_bytes(uri) == b"abc"


def test_arrow_reads_local_disk_itself_whatever_a_name_has(tmp_path: Path) -> None:
    (tmp_path / "a b%20?#é").write_bytes(b"abc")
    filesystem, path = storage.arrow_filesystem(f"{tmp_path}/a b%20?#é")
    assert isinstance(filesystem, pyarrow.fs.LocalFileSystem)
    assert filesystem.open_input_file(path).read() == b"abc"
