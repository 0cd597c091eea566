"""Storage on local disk, on a real S3 server, and on filesystems that fail."""

import errno
import os
import re
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from running import jpeg, rows
from s3server import S3Server

from pipeline import storage
from pipeline.config import AmgConfig, ImagesConfig, MasksConfig
from pipeline.contents import content_of
from pipeline.errors import StorageError
from pipeline.manifest import write_manifest
from pipeline.model import load_model
from pipeline.shard import make_shard
from pipeline.sources import ImageRef
from pipeline.storage import attempts, s3

AWKWARD_NAMES = [
    "plain.jpg",
    "with space.jpg",
    "Größe/日本/naïve.jpg",
    "e\u0301 not composed.jpg",
    "hash#tag.jpg",
    "per%20cent%.jpg",
    "what?.jpg",
    "a?versionId=3",
    "one+two.jpg",
    "_under.jpg",
    ".dot.jpg",
    "[1]*.jpg",
    "quote'\"<&>.jpg",
    "a::b.jpg",
]


def names(uri: str) -> list[str]:
    return sorted(file.uri.rpartition("/")[2] for file in storage.list_files(uri))


def write_tree(folder: Path, *paths: str) -> str:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(path.encode())
    return str(folder)


@pytest.fixture
def fresh_client() -> Any:
    """For tests that change the environment which S3's client is made from."""
    s3.client.cache_clear()
    yield
    s3.client.cache_clear()


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


def test_case_27_keys_round_trip_on_disk(tmp_path: Path) -> None:
    write_tree(tmp_path, *AWKWARD_NAMES)
    listed = {file.uri: storage.read_bytes(file.uri).decode() for file in storage.list_files(str(tmp_path))}
    assert listed == {f"file://{tmp_path}/{name}": name for name in AWKWARD_NAMES}
    assert all(next(storage.list_files(uri)).uri == uri for uri in listed)


def test_case_27_keys_round_trip_on_s3(s3_server: S3Server, bucket: str) -> None:
    for name in AWKWARD_NAMES:
        s3_server.put(f"{bucket}/in/{name}", name.encode())
    listed = {file.uri: storage.read_bytes(file.uri).decode() for file in storage.list_files(f"{bucket}/in")}
    assert listed == {f"{bucket}/in/{name}": name for name in AWKWARD_NAMES}
    assert all(next(storage.list_files(uri)).uri == uri for uri in listed)
    for name in AWKWARD_NAMES:
        storage.write_atomic(f"{bucket}/out/{name}", name.encode())
        assert storage.exists(f"{bucket}/out/{name}")
    client = s3_server.client()
    page = client.call_s3("list_objects_v2", Bucket=bucket.removeprefix("s3://"), Prefix="out/")
    assert {item["Key"] for item in page["Contents"]} == {f"out/{name}" for name in AWKWARD_NAMES}


def test_case_26_same_name_in_two_folders(tmp_path: Path) -> None:
    write_tree(tmp_path, "a/1.jpg", "b/1.jpg")
    listed = {file.uri: file.size for file in storage.list_files(str(tmp_path))}
    assert listed == {f"file://{tmp_path}/a/1.jpg": 7, f"file://{tmp_path}/b/1.jpg": 7}


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


def test_redact_hides_what_lets_one_in() -> None:
    assert storage.redact("s3://AKIA:se/cr+et@bucket/key") == "s3://***@bucket/key"
    assert storage.redact("https://user:pw@host/a") == "https://***@host/a"
    assert storage.redact("https://ghp_token@host/a") == "https://***@host/a"
    signed = "https://h/a.jpg?X-Amz-Credential=AK&X-Amz-Date=1&X-Amz-Signature=abc&w=3"
    assert storage.redact(signed) == "https://h/a.jpg?X-Amz-Credential=***&X-Amz-Date=1&X-Amz-Signature=***&w=3"
    for harmless in [
        "s3://bucket/a:b@c.jpg",
        "https://h:80/a@b",
        "abfs://box@account.example/x",
        "file:///a@b:c",
    ]:
        assert storage.redact(harmless) == harmless


def test_errors_hold_no_credentials() -> None:
    for address in [
        "s3://AKIA:s3cr3t@bucket/key",
        "https://me:s3cr3t@127.0.0.1:1/x?sig=s3cr3t",
        "nope://k:s3cr3t@x",
    ]:
        with pytest.raises(StorageError) as caught:
            _once(lambda address=address: storage.read_bytes(address))
        assert "s3cr3t" not in str(caught.value)
        assert "s3cr3t" not in str(caught.value.__cause__)


def _once(call: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attempts, "ATTEMPTS", 1)
        call()


# Listing


def test_globs(tmp_path: Path) -> None:
    root = write_tree(tmp_path, "a/1.jpg", "a/2.png", "b/3.jpg", "b/c/4.jpg", "5.jpg")
    assert names(f"{root}/*.jpg") == ["5.jpg"]
    assert names(f"{root}/*/*.jpg") == ["1.jpg", "3.jpg"]
    assert names(f"{root}/**/*.jpg") == ["1.jpg", "3.jpg", "4.jpg", "5.jpg"]
    assert names(f"{root}/[ab]/?.png") == ["2.png"]
    assert names(f"{root}/*.gif") == []
    with pytest.raises(StorageError, match="'\\*\\*' can only be"):
        names(f"{root}/a**b")


def test_globs_on_s3(s3_server: S3Server, bucket: str) -> None:
    for key in ["a/1.jpg", "a/12.jpg", "a/2.png", "b/1.jpg", "a/c/1.jpg"]:
        s3_server.put(f"{bucket}/{key}", b"x")
    assert names(f"{bucket}/a/1*.jpg") == ["1.jpg", "12.jpg"]
    assert names(f"{bucket}/*/1.jpg") == ["1.jpg", "1.jpg"]
    assert names(f"{bucket}/**.jpg".replace("**", "**/*")) == ["1.jpg"] * 3 + ["12.jpg"]


def test_a_name_that_looks_like_a_glob_is_that_file(tmp_path: Path) -> None:
    root = write_tree(tmp_path, "x[1].jpg", "x1.jpg", "d[1]/y.jpg")
    assert names(f"{root}/x[1].jpg") == ["x[1].jpg"]
    assert names(f"{root}/d[1]") == ["y.jpg"]


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    write_tree(tmp_path, "in/a/1.jpg", "elsewhere/2.jpg")
    (tmp_path / "in/there").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "in")
    (tmp_path / "in/a/self").symlink_to(tmp_path / "in")
    (tmp_path / "in/broken.jpg").symlink_to(tmp_path / "nothing")
    assert names(str(tmp_path / "in")) == ["1.jpg", "2.jpg"]


def test_case_28_folder_markers_are_not_files(s3_server: S3Server, bucket: str) -> None:
    for key in ["in/", "in/sub/", "in/sub/1.jpg", "inside.jpg"]:
        s3_server.put(f"{bucket}/{key}", b"" if key.endswith("/") else b"x")
    assert [file.uri for file in storage.list_files(f"{bucket}/in/")] == [f"{bucket}/in/sub/1.jpg"]
    assert sorted(storage.list_names(f"{bucket}/in")) == ["sub"]


def test_listing_pages_through_s3(s3_server: S3Server, bucket: str) -> None:
    client = s3_server.client()
    client.pipe({f"{bucket}/many/{i:05d}": b"x" for i in range(1100)})
    assert len(list(storage.list_files(f"{bucket}/many"))) == 1100
    assert len(list(storage.list_names(f"{bucket}/many"))) == 1100


def test_list_names(tmp_path: Path, bucket: str) -> None:
    root = write_tree(tmp_path, "a", "b/c")
    assert sorted(storage.list_names(root)) == ["a", "b"]
    assert list(storage.list_names(f"{root}/nothing")) == []
    assert list(storage.list_names(f"{bucket}/nothing")) == []


def test_case_23_missing_addresses_are_named(tmp_path: Path, bucket: str) -> None:
    for address in [
        str(tmp_path / "nothing"),
        f"{bucket}/nothing",
        "s3://there-is-no-such-bucket/in",
        "memory://no/x",
    ]:
        with pytest.raises(StorageError, match=address):
            list(storage.list_files(address))
    with pytest.raises(StorageError, match="s3://there-is-no-such-bucket/out"):
        storage.write_atomic("s3://there-is-no-such-bucket/out", b"x")


def test_case_22_an_empty_folder_or_bucket_is_no_error(tmp_path: Path, bucket: str) -> None:
    assert list(storage.list_files(str(tmp_path))) == []
    assert list(storage.list_files(bucket)) == []


@pytest.mark.usefixtures("fresh_client")
def test_case_23_wrong_credentials_fail_at_once(
    s3_server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3_server.put(f"{bucket}/a", b"x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    begin = time.monotonic()
    with pytest.raises(StorageError, match=f"{bucket}/a: PermissionError: .*signature.*check the credentials"):
        list(storage.list_files(f"{bucket}/a"))
    with pytest.raises(StorageError, match=f"cannot write {bucket}/b: PermissionError.*check the credentials"):
        storage.write_atomic(f"{bucket}/b", b"x")
    assert time.monotonic() - begin < 5


def test_case_23_a_folder_that_cannot_be_listed(tmp_path: Path) -> None:
    """By a link to itself, as a folder without permissions is open to root."""
    write_tree(tmp_path, "in/1.jpg")
    (tmp_path / "in/loop").symlink_to("loop")
    for address in (tmp_path, tmp_path / "in/loop"):
        with pytest.raises(StorageError, match=f"cannot list {tmp_path}/in.*symbolic links.*loop"):
            list(storage.list_files(str(address)))


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


# Attempts


class FlakyFileSystem(MemoryFileSystem):
    """A filesystem in memory whose next calls fail with the errors in `failures`."""

    protocol = "flaky"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    failures: ClassVar[list[Exception]] = []
    calls = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("flaky://")))

    def _fail(self) -> None:
        FlakyFileSystem.calls += 1
        if self.failures:
            raise self.failures.pop(0)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> Any:
        self._fail()
        return super().cat_file(path, start, end, **kwargs)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> Any:
        self._fail()
        return super().pipe_file(path, value, mode, **kwargs)


class PlainFileSystem(FlakyFileSystem):
    """One that writes bit by bit, as a disk does, and renames onto nothing only; it fails in the middle."""

    protocol = "sftp"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    failures: ClassVar[list[Exception]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("sftp://host")))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> Any:
        MemoryFileSystem.pipe_file(self, path, value[: len(value) // 2])
        super().pipe_file(path, value)

    def mv(self, path1: str, path2: str, **kwargs: Any) -> None:
        if self.exists(path2):
            raise FileExistsError(path2)
        super().mv(path1, path2)


def test_where_a_file_is_written_bit_by_bit_half_of_one_is_never_seen(flaky: type[FlakyFileSystem]) -> None:
    fsspec.register_implementation("sftp", PlainFileSystem, clobber=True)
    uri = "sftp://host/out/masks/x"
    storage.write_atomic(uri, b"old")
    PlainFileSystem.failures.append(ValueError("the server is gone"))
    with pytest.raises(StorageError, match="the server is gone"):
        storage.write_atomic(uri, b"newer")
    assert storage.read_bytes(uri) == b"old"
    PlainFileSystem.failures.append(ConnectionResetError())  # which is tried again
    storage.write_atomic(uri, b"newer")
    assert storage.read_bytes(uri) == b"newer"
    assert list(storage.list_names("sftp://host/out/masks")) == ["x"]


class Throttled(Exception):
    code = 429


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> type[FlakyFileSystem]:
    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    monkeypatch.setattr(attempts, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(attempts, "JITTER_S", 0.001)
    FlakyFileSystem.failures.clear()
    storage.write_atomic("flaky://x", b"data")
    FlakyFileSystem.calls = 0
    return FlakyFileSystem


def test_case_25_what_passes_is_tried_again(flaky: type[FlakyFileSystem]) -> None:
    passing = [ConnectionResetError(), TimeoutError(), OSError(errno.EBUSY, "SlowDown"), Throttled()]
    flaky.failures += passing
    assert storage.read_bytes("flaky://x") == b"data"
    assert flaky.calls == 5
    flaky.failures += [BrokenPipeError(), ConnectionResetError()]
    storage.write_atomic("flaky://x", b"new")
    assert storage.read_bytes("flaky://x") == b"new"


def test_case_25_attempts_end(flaky: type[FlakyFileSystem]) -> None:
    flaky.failures += [ConnectionResetError(errno.ECONNRESET, "reset by peer")] * 100
    with pytest.raises(StorageError, match=r"flaky://x after 8 attempts: ConnectionResetError: .*reset by peer"):
        storage.read_bytes("flaky://x")
    assert flaky.calls == attempts.ATTEMPTS == 8


@pytest.mark.parametrize("error", [FileNotFoundError("SlowDown.jpg"), PermissionError("no"), ValueError("bad")])
def test_what_does_not_pass_is_not_tried_again(flaky: type[FlakyFileSystem], error: Exception) -> None:
    flaky.failures.append(error)
    with pytest.raises(StorageError, match=str(error)):
        storage.read_bytes("flaky://x")
    assert flaky.calls == 1


SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"
ANSWER_503 = b"HTTP/1.1 503 Slow Down\r\nContent-Length: %d\r\n\r\n%s" % (len(SLOW_DOWN), SLOW_DOWN)
ANSWER_500 = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n"
ANSWER_CUT = b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nhalf"
ANSWER_OK = b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nthewhole"
ANSWER_WRITTEN = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
DENIED = b"<Error><Code>AccessDenied</Code><Message>Access Denied.</Message></Error>"
ANSWER_403 = b"HTTP/1.1 403 Forbidden\r\nContent-Length: %d\r\n\r\n%s" % (len(DENIED), DENIED)
HANG_UP = b""


def answer_of(data: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(data), data)


@contextmanager
def scripted_s3(answers: list[bytes]) -> Iterator[list[bytes]]:
    """A server for S3's client that gives one answer a connection; yields those it has given."""
    given: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.MonkeyPatch.context() as patch:
        server.settimeout(20)
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        patch.setattr(attempts, "FIRST_WAIT_S", 0.01)
        patch.setattr(attempts, "JITTER_S", 0.01)

        def serve() -> None:
            with suppress(OSError):
                for answer in answers:
                    with server.accept()[0] as connection:
                        connection.recv(65536)
                        connection.sendall(answer)
                        given.append(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield given
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.usefixtures("s3_server", "fresh_client")
def test_case_25_s3_is_slow_fails_or_hangs_up() -> None:
    answers = [ANSWER_503, HANG_UP, ANSWER_500, ANSWER_CUT, ANSWER_OK]
    with scripted_s3(answers) as given:
        assert storage.read_bytes("s3://bucket/key") == b"thewhole"
    assert given == answers


@pytest.mark.usefixtures("s3_server", "fresh_client")
def test_case_25_a_file_is_written_again_from_its_beginning() -> None:
    answers = [ANSWER_503, ANSWER_WRITTEN]
    with scripted_s3(answers) as given, tempfile.SpooledTemporaryFile(4) as file:
        file.write(b"thewhole")
        storage.write_atomic("s3://bucket/key", file)
    assert given == answers


@pytest.mark.usefixtures("s3_server", "fresh_client")
def test_case_24_one_403_among_many_is_a_row(tmp_path: Path, tiny_checkpoint: Path) -> None:
    config = MasksConfig(
        images="s3://bucket/in",
        output=f"file://{tmp_path}",
        amg=AmgConfig(points_per_side=1),
        reading=ImagesConfig(read_ahead=1),
    )
    pictures = [jpeg(index) for index in range(3)]
    refs = [ImageRef(f"s3://bucket/in/{i}.jpg", len(data), None, None, None) for i, data in enumerate(pictures)]
    write_manifest(refs, config.output, images_per_shard=3)
    answers = [answer_of(pictures[0]), ANSWER_403, answer_of(pictures[2])]
    with scripted_s3(answers) as given:
        make_shard(0, config, content_of(config, load_model(str(tiny_checkpoint))), {"fingerprint": "f"})
    assert given == answers
    found = rows(tmp_path)
    assert [row["status"] for row in found[::2]] == ["empty", "empty"]
    assert found[1]["status"] == "fetch_failed"
    assert re.search(r"s3://bucket/in/1\.jpg: PermissionError.*check the credentials", found[1]["error"])


@pytest.mark.usefixtures("s3_server", "fresh_client")
def test_case_25_nothing_below_multiplies_the_attempts() -> None:
    with (
        scripted_s3([ANSWER_503] * 100) as given,
        pytest.raises(StorageError, match=r"s3://bucket/key after 8 attempts.*Reduce your request rate"),
    ):
        storage.read_bytes("s3://bucket/key")
    assert len(given) == attempts.ATTEMPTS
