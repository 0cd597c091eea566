"""The main job on S3: its driver killed, taken up again; refusals."""

import contextlib
import os
import re
import subprocess
import time
from pathlib import Path

import pyarrow.fs
import pytest
from faulty_proxy import faulty_proxy
from running import TIMEOUT_S, call, command, jpeg, rows, run
from runs_of_masks import job, made_without_ray
from s3server import S3Server

pytestmark = pytest.mark.alone

BAD: dict[str, tuple[bytes, str]] = {
    "empty.jpg": (b"", "empty_file"),
    "cut.jpg": (jpeg(7)[:1000], "truncated"),
    "page.jpg": (b"<html>Not found</html>", "not_an_image"),
}


@pytest.fixture(scope="module")
def pictures() -> dict[str, bytes]:
    """60 pictures by name: of the folder $EVERYMASK_PICTURES where it is set, else pieces of photographs."""
    folder = os.environ.get("EVERYMASK_PICTURES")
    if folder:
        return {path.name: path.read_bytes() for path in sorted(Path(folder).rglob("*.jpg"))[:60]}
    return {f"piece {index}.jpg": jpeg(index) for index in range(60)}


def test_case_35_a_killed_driver_and_another_number_of_workers(
    tiny_checkpoint: Path,
    s3_server: S3Server,
    bucket: str,
    pictures: dict[str, bytes],
    cluster: dict[str, str],
) -> None:
    """The driver is killed while it makes shards and still lists: the second page is kept back until then."""
    assert len(pictures) >= 50
    files = pictures | {name: data for name, (data, _) in BAD.items()}
    files |= {f"void {index:04d}.jpg": b"" for index in range(1000)}  # so that a page does not hold all
    client = s3_server.client()
    client.pipe({f"{bucket}/in/{name}": data for name, data in files.items() | {("README.md", b"sidecar")}})
    checkpoint = f"{bucket}/weights/tiny.safetensors"
    s3_server.put(checkpoint, tiny_checkpoint.read_bytes())
    flags = job(Path("x"), f"{bucket}/in", f"{bucket}/out", "--images-per-shard", "3")
    flags[flags.index(Path("x"))] = checkpoint
    flags += ["--cpus-per-worker", "1", "--max-failure-rate", "1"]
    so_far = "768 images in 256 shards so far, while listing goes on"  # a part of the manifest

    with faulty_proxy(s3_server.endpoint) as proxy:
        proxy.hold("continuation-token", after=1)  # which is the look at the address before the run
        process = subprocess.Popen(
            command(*flags, "--num-workers", "1"),
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | cluster | {"AWS_ENDPOINT_URL": proxy.endpoint},
        )
        masks = f"{bucket.removeprefix('s3://')}/out/masks"
        deadline = time.monotonic() + TIMEOUT_S
        done: list[str] = []
        while len(done) < 3 and process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(FileNotFoundError):
                done = client.ls(masks, detail=False)
            time.sleep(0.05)
        assert ", as far as they are listed" in call("jobs.status", "--output", f"{bucket}/out").stdout
        process.kill()
        assert f"{so_far}, 256 to do" in process.communicate()[1]
        proxy.release()
    shards = -(-len(files) // 3)
    assert 3 <= len(client.ls(masks, detail=False)) < shards, "the driver was not killed in the middle"
    unfinished = call("jobs.verify_masks", "--output", f"{bucket}/out")
    assert (unfinished.returncode, "still being listed" in unfinished.stderr) == (2, True)

    resumed = run(*flags, "--num-workers", "2", **cluster)
    assert resumed.returncode == 0, resumed.stderr
    to_do = re.search(rf"{so_far}, (\d+) to do", resumed.stderr)
    assert to_do and int(to_do[1]) <= 256 - 3
    filesystem = pyarrow.fs.S3FileSystem(
        access_key=s3_server.key,
        secret_key=s3_server.secret,
        endpoint_override=s3_server.endpoint,
        region="us-east-1",
    )
    found = rows(bucket.removeprefix("s3://") + "/out", filesystem=filesystem)
    assert [row["image_id"] for row in found] == list(range(len(files)))
    expected = {f"{bucket}/in/{name}": "empty_file" for name in files}
    expected |= {f"{bucket}/in/{name}": "ok" for name in pictures}
    expected |= {f"{bucket}/in/{name}": status for name, (_, status) in BAD.items()}
    assert [row["uri"] for row in found] == sorted(expected)
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
    for images, environment in attempts.items():
        start = time.monotonic()
        refused = run(*job(tiny_checkpoint, images, tmp_path / "out"), **environment)
        assert refused.returncode == 3, refused.stderr
        assert images in refused.stderr
        assert time.monotonic() - start < 20  # ten on a machine that does nothing else
    refused = run(*job(tiny_checkpoint, f"{bucket}/in", "s3://no-such-bucket/out"))
    assert refused.returncode == 3
    assert "cannot write s3://no-such-bucket/out" in refused.stderr
    assert "wrong-secret" not in refused.stderr
