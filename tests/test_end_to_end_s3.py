"""The main job on S3: its driver killed, taken up again; refusals."""

import contextlib
import os
import re
import subprocess
import time
from pathlib import Path

import pyarrow.fs
import pytest
from running import TIMEOUT_S, call, command, jpeg, rows, run
from runs_of_masks import job, made_without_ray
from s3server import S3Server

pytestmark = pytest.mark.alone

BAD: dict[str, tuple[bytes, str]] = {
    "bad/empty.jpg": (b"", "empty_file"),
    "bad/cut.jpg": (jpeg(7)[:1000], "truncated"),
    "bad/page.jpg": (b"<html>Not found</html>", "not_an_image"),
}


@pytest.fixture(scope="module")
def pictures() -> dict[str, bytes]:
    """60 pictures by name: of the folder $EVERYMASK_PICTURES where it is set, else pieces of photographs."""
    folder = os.environ.get("EVERYMASK_PICTURES")
    if folder:
        return {path.name: path.read_bytes() for path in sorted(Path(folder).rglob("*.jpg"))[:60]}
    return {f"piece {index}.jpg": jpeg(index) for index in range(60)}


def test_case_35_a_killed_driver_and_another_number_of_workers(
    tmp_path: Path, tiny_checkpoint: Path, s3_server: S3Server, bucket: str, pictures: dict[str, bytes]
) -> None:
    assert len(pictures) >= 50
    for name, data in pictures.items():
        s3_server.put(f"{bucket}/in/photos/{name}", data)
    for name, (data, _) in BAD.items():
        s3_server.put(f"{bucket}/in/{name}", data)
    s3_server.put(f"{bucket}/in/photos/README.md", b"sidecar")
    checkpoint = f"{bucket}/weights/tiny.safetensors"
    s3_server.put(checkpoint, tiny_checkpoint.read_bytes())
    flags = job(Path("x"), f"{bucket}/in", f"{bucket}/out", "--images-per-shard", "2")
    flags[flags.index(Path("x"))] = checkpoint
    flags += ["--cpus-per-worker", "1"]

    process = subprocess.Popen(command(*flags, "--num-workers", "1"), stderr=subprocess.DEVNULL)
    client = s3_server.client()
    masks = f"{bucket.removeprefix('s3://')}/out/masks"
    deadline = time.monotonic() + TIMEOUT_S
    done: list[str] = []
    while len(done) < 3 and time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            done = client.ls(masks, detail=False)
        time.sleep(0.05)
    process.kill()
    process.wait()
    total = len(pictures) + len(BAD)
    shards = -(-total // 2)
    assert 3 <= len(client.ls(masks, detail=False)) < shards, "the driver was not killed in the middle"

    resumed = run(*flags, "--num-workers", "2")
    assert resumed.returncode == 0, resumed.stderr
    to_do = re.search(r"(\d+) to do", resumed.stderr)
    assert to_do and int(to_do[1]) <= shards - 3
    filesystem = pyarrow.fs.S3FileSystem(
        access_key=s3_server.key,
        secret_key=s3_server.secret,
        endpoint_override=s3_server.endpoint,
        region="us-east-1",
    )
    found = rows(bucket.removeprefix("s3://") + "/out", filesystem=filesystem)
    assert [row["image_id"] for row in found] == list(range(total))
    expected = {f"{bucket}/in/photos/{name}": "ok" for name in pictures}
    expected |= {f"{bucket}/in/{name}": status for name, (_, status) in BAD.items()}
    assert {row["uri"]: row["status"] for row in found} == expected
    assert call("jobs.verify_masks", "--output", f"{bucket}/out").returncode == 0

    made_without_ray(tiny_checkpoint, f"{bucket}/in", f"{bucket}/undisturbed", images_per_shard=64)
    assert rows(bucket.removeprefix("s3://") + "/undisturbed", filesystem=filesystem) == found


def test_case_23_s3_refusals_come_within_seconds(
    tmp_path: Path, tiny_checkpoint: Path, s3_server: S3Server, bucket: str
) -> None:
    s3_server.put(f"{bucket}/in/a.jpg", jpeg(0))
    attempts = {
        "s3://no-such-bucket/in": {},
        f"{bucket}/in": {"AWS_SECRET_ACCESS_KEY": "wrong-secret"},
    }
    start = time.monotonic()
    assert run("jobs.generate_masks", "--help").returncode == 0
    imports_s = time.monotonic() - start  # most of the time, and the machine's alone
    for images, environment in attempts.items():
        start = time.monotonic()
        refused = run(*job(tiny_checkpoint, images, tmp_path / "out"), **environment)
        assert refused.returncode == 3, refused.stderr
        assert images in refused.stderr
        assert time.monotonic() - start < imports_s + 20
    refused = run(*job(tiny_checkpoint, f"{bucket}/in", "s3://no-such-bucket/out"))
    assert refused.returncode == 3
    assert "no-such-bucket/out" in refused.stderr
    assert "wrong-secret" not in refused.stderr
