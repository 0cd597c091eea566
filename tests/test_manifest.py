"""The manifest: the same for any order of listing, and one shard is one row group."""

import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline import manifest, sorting, storage
from pipeline.errors import SettingsError, StorageError
from pipeline.manifest import ManifestInfo, digest_of, read_shard, write_manifest
from pipeline.sources import ImageRef
from schemas.manifest import MANIFEST_SCHEMA


def listing(count: int) -> list[ImageRef]:
    """Files, tar members and Parquet rows, in a fixed, unsorted order."""
    refs = []
    for i in range(count):
        if i % 3 == 0:
            refs.append(ImageRef(f"s3://b/{i}.jpg", i, f'"{i}"', None, None))
        elif i % 3 == 1:
            refs.append(
                ImageRef(f"tar://{count - i}.jpg::s3://b/{i % 7}.tar", i, None, f"s3://b/{i % 7}.tar", i * 512)
            )
        else:
            refs.append(
                ImageRef(f"parquet://{i}::s3://b/{i % 5}.parquet", None, "e", f"s3://b/{i % 5}.parquet", i)
            )
    random.Random(0).shuffle(refs)
    return refs


def read_all(output: str, info: ManifestInfo) -> list[manifest.ManifestRow]:
    return [row for shard in range(info.shards) for row in read_shard(output, shard)]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "manifest").iterdir()}


def test_rows_are_sorted_numbered_and_complete(tmp_path: Path) -> None:
    refs = listing(100)
    info = write_manifest(iter(refs), str(tmp_path), images_per_shard=7)
    rows = read_all(str(tmp_path), info)
    assert (info.images, info.shards, info.duplicates) == (100, 15, 0)
    assert [row.image_id for row in rows] == list(range(100))
    assert [row.ref for row in rows] == sorted(refs, key=lambda r: (r.container or r.uri, r.position or 0, r.uri))
    assert pq.read_schema(tmp_path / "manifest/part-00000.parquet").equals(MANIFEST_SCHEMA)


def test_sorting_outside_memory_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refs = listing(3000) * 2
    whole = write_manifest(iter(refs), str(tmp_path / "a"), images_per_shard=64)
    monkeypatch.setattr(sorting, "RUNS_OPEN", 4)  # so runs of runs are merged too
    random.Random(1).shuffle(refs)
    spilled = write_manifest(iter(refs), str(tmp_path / "b"), images_per_shard=64, rows_in_memory=100)
    assert whole == spilled
    assert (whole.images, whole.duplicates) == (3000, 3000)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_the_digest_is_that_of_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "SHARDS_PER_PART", 4)
    info = write_manifest(listing(100), str(tmp_path), images_per_shard=7)
    assert digest_of(str(tmp_path), info.shards) == info.digest
    write_manifest(listing(99), str(tmp_path), images_per_shard=7)
    assert digest_of(str(tmp_path), info.shards) != info.digest
    nothing = write_manifest(iter(()), str(tmp_path), images_per_shard=7)
    assert digest_of(str(tmp_path), nothing.shards) == nothing.digest


def test_what_is_raised_before_writing_prevents_it(tmp_path: Path) -> None:
    def refuse(info: ManifestInfo) -> None:
        raise ValueError(f"{info.images} in {info.shards}")

    before = write_manifest(listing(3), str(tmp_path), images_per_shard=7)
    written = files(tmp_path)
    with pytest.raises(ValueError, match="100 in 15"):
        write_manifest(listing(100), str(tmp_path), images_per_shard=7, before_write=refuse)
    assert files(tmp_path) == written
    assert digest_of(str(tmp_path), before.shards) == before.digest


def test_the_digest_sees_every_column_but_not_the_shards(tmp_path: Path) -> None:
    refs = listing(9)
    digest = write_manifest(refs, str(tmp_path), images_per_shard=2).digest
    assert len(digest) == 64
    assert write_manifest(refs, str(tmp_path), images_per_shard=5).digest == digest
    changes = {"uri": "s3://b/other", "size": 77, "etag": "new", "container": "s3://b/9.tar", "position": 99}
    for name, value in changes.items():
        changed = [refs[0]._replace(**{name: value}), *refs[1:]]
        assert write_manifest(changed, str(tmp_path), images_per_shard=2).digest != digest


def test_case_32_the_same_uri_twice_is_one_row(tmp_path: Path) -> None:
    refs = [ImageRef(f"s3://b/{i}", None, None, None, None) for i in (3, 1, 3, 2, 3)]
    info = write_manifest(iter(refs), str(tmp_path), images_per_shard=10)
    assert (info.images, info.duplicates) == (3, 2)
    assert [row.ref.uri for row in read_all(str(tmp_path), info)] == ["s3://b/1", "s3://b/2", "s3://b/3"]
    with_size = [ImageRef("s3://b/3", 5, "e", None, None), refs[0]]
    digests = {write_manifest(r, str(tmp_path), images_per_shard=1).digest for r in (with_size, with_size[::-1])}
    assert len(digests) == 1


def test_parts_hold_a_fixed_number_of_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "SHARDS_PER_PART", 4)
    info = write_manifest(listing(100), str(tmp_path), images_per_shard=7)
    groups = []
    for path in sorted((tmp_path / "manifest").iterdir()):
        metadata = pq.read_metadata(path)
        groups.append([metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)])
    assert groups == [[7] * 4, [7] * 4, [7] * 4, [7, 7, 2]]
    assert [row.image_id for row in read_shard(str(tmp_path), 5)] == list(range(35, 42))
    assert len(read_all(str(tmp_path), info)) == 100
    # A shorter one over it leaves nothing of the longer.
    write_manifest(listing(10), str(tmp_path), images_per_shard=7)
    assert sorted(files(tmp_path)) == ["part-00000.parquet"]


def test_shards_that_end_with_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "SHARDS_PER_PART", 2)
    assert write_manifest(listing(12), str(tmp_path), images_per_shard=3).shards == 4
    assert sorted(files(tmp_path)) == ["part-00000.parquet", "part-00001.parquet"]


def test_no_images_give_a_manifest_without_rows(tmp_path: Path) -> None:
    info = write_manifest(iter(()), str(tmp_path), images_per_shard=5)
    assert (info.images, info.shards) == (0, 0)
    assert pq.read_table(tmp_path / "manifest/part-00000.parquet").num_rows == 0


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="images_per_shard is 0"):
        write_manifest(iter(()), str(tmp_path), images_per_shard=0)
    with pytest.raises(StorageError, match="part-00000"):
        read_shard(str(tmp_path), 0)
    write_manifest(listing(5), str(tmp_path), images_per_shard=5)
    for shard in (1, -1):
        with pytest.raises(StorageError):
            read_shard(str(tmp_path), shard)
    (tmp_path / "manifest/part-00000.parquet").write_bytes(b"PAR1 damaged")
    with pytest.raises(StorageError, match="damaged"):
        read_shard(str(tmp_path), 0)


def test_a_shard_on_s3_is_read_in_ranges(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refs = [
        ImageRef(f"s3://b/{random.Random(i).randbytes(40).hex()}.jpg", i, None, None, None) for i in range(40_000)
    ]
    info = write_manifest(refs, bucket, images_per_shard=400)
    size = storage.stat(f"{bucket}/manifest/part-00000.parquet").size  # type: ignore[union-attr]
    ranges = []
    read = storage.read_bytes

    def counted(*args: object, **kwargs: object) -> bytes:
        data = read(*args, **kwargs)  # type: ignore[arg-type]
        ranges.append(len(data))
        return data

    monkeypatch.setattr(storage, "read_bytes", counted)
    rows = read_shard(bucket, 50)
    assert [row.image_id for row in rows] == list(range(20_000, 20_400))
    assert len(ranges) <= 4
    assert sum(ranges) < size / 2  # type: ignore[operator]
    assert info.shards == 100


def test_the_digest_is_that_of_the_rows_as_json(tmp_path: Path) -> None:
    """However awkward the names are: a digest that is made in another way refuses every run that is there."""
    awkward = [
        '"quoted"',
        "back\\slash",
        "Größe/日本",
        "e\u0301",
        "\U0001f600",
        "tab\there",
        "del\x7f",
        "a, b",
        "null",
    ]
    for names in (["plain", 'q"', "b\\"], awkward):
        refs = [ImageRef(f"s3://b/{name}", i, f'"{name}"', None, None) for i, name in enumerate(names)]
        refs += [ImageRef(f"tar://m::s3://c/{name}", None, None, f"s3://c/{name}", 512) for name in names]
        in_order = sorted(refs, key=lambda ref: (ref.container or ref.uri, ref.uri))
        expected = hashlib.sha256("".join(map(json.dumps, in_order)).encode()).hexdigest()
        assert write_manifest(refs[::-1], str(tmp_path), images_per_shard=4).digest == expected


MEMORY = """
import sys
from pathlib import Path
from pipeline import sorting
from pipeline.manifest import write_manifest
from pipeline.sources import ImageRef

sorting.RUNS_OPEN = 4

def listing(count):
    for index in range(count):
        shuffled = index * 2_654_435_761 % 2**32
        yield ImageRef(f"s3://bucket/{shuffled:010d}/{'x' * 400}.jpg", 1, None, None, None)

def peak():
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) // 1024

output, rows = sys.argv[1], 2_000
write_manifest(listing(8 * rows), output, images_per_shard=64, rows_in_memory=rows)
before = peak()
write_manifest(listing(60 * rows), output, images_per_shard=64, rows_in_memory=rows)
print(peak() - before)
"""


def test_memory_does_not_grow_with_the_listing(tmp_path: Path) -> None:
    """Rows of half a kilobyte, 16,000 and then 120,000 of them: sorted runs are merged, and merged again."""
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
    assert int(done.stdout) < 80  # all of them at once take twice that


def test_shards_of_very_large_images_come_first(tmp_path: Path) -> None:
    sizes = [10, 10, 10, 900, 10, 20, 10, 5000, None, 10]
    refs = [ImageRef(f"file:///{index:02d}.jpg", size, None, None, None) for index, size in enumerate(sizes)]
    output = tmp_path.as_uri()
    manifest.write_manifest(refs, output, images_per_shard=1)
    assert manifest.largest_first(output, list(range(10))) == [7, 0, 1, 2, 3, 4, 5, 6, 8, 9]
    assert manifest.largest_first(output, [8, 5, 3, 2, 1, 0]) == [3, 8, 5, 2, 1, 0]
    assert manifest.largest_first(output, []) == []
