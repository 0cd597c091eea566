"""Storage that fails: what is tried again, and what an error says, without credentials, in the end."""

import errno
import re
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from running import decode_here, jpeg, rows
from s3server import S3Server

from pipeline import storage
from pipeline.config import AmgConfig, ImagesConfig, MasksConfig
from pipeline.errors import StorageError
from pipeline.manifest import write_manifest
from pipeline.model import load_model
from pipeline.predict import content_of
from pipeline.shard import make_shard
from pipeline.sources import ImageRef
from pipeline.storage import attempts, s3


@pytest.fixture
def fresh_client() -> Any:
    """For tests that change the environment which S3's client is made from."""
    s3.client.cache_clear()
    yield
    s3.client.cache_clear()


def _once(call: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attempts, "ATTEMPTS", 1)
        call()


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


@pytest.mark.usefixtures("fresh_client")
def test_case_23_wrong_credentials_are_not_tried_again(
    s3_server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3_server.put(f"{bucket}/a", b"x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageError, match=f"{bucket}/a: PermissionError: .*signature.*check the credentials"):
        list(storage.list_files(f"{bucket}/a"))
    with pytest.raises(StorageError, match=f"cannot write {bucket}/b: PermissionError.*check the credentials"):
        storage.write_atomic(f"{bucket}/b", b"x")


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
        content = content_of(config, load_model(str(tiny_checkpoint)))
        make_shard(0, config, content, decode_here(config), {"fingerprint": "f"})
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
