"""Sources: folders, globs, lists, tars and Parquet files, on disk and on a real S3 server."""

import io
import tarfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3server import S3Server

from pipeline import storage
from pipeline.errors import ImageError, SettingsError, StorageError
from pipeline.sources import ImageRef, fetch, find_images
from schemas.masks import Status

LIMIT = 10_000_000


def found(address: str | Path) -> tuple[list[ImageRef], Counter[str]]:
    skipped: Counter[str] = Counter()
    return sorted(find_images(str(address), skipped)), skipped


def uris(address: str | Path) -> list[str]:
    return [ref.uri for ref in found(address)[0]]


def contents(address: str | Path) -> dict[str, bytes]:
    return {ref.uri: fetch(ref, max_bytes=LIMIT) for ref in found(address)[0]}


def status_of(ref: ImageRef, max_bytes: int = LIMIT) -> Status:
    with pytest.raises(ImageError) as caught:
        fetch(ref, max_bytes=max_bytes)
    assert str(caught.value)
    return caught.value.status


def write_tree(folder: Path, *paths: str) -> None:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(path.encode())


def tar_bytes(*members: tuple[str, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:  # noqa: A002
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def parquet_bytes(table: pa.Table, rows: int = 4) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=rows)
    return buffer.getvalue()


def hugging_face_table(count: int) -> pa.Table:
    images = [{"bytes": b"image %d" % i, "path": f"{i}.jpg"} for i in range(count)]
    return pa.table({"label": list(range(count)), "image": images})


# Folders, globs and lists


def test_case_28_sidecars_are_counted_by_name(tmp_path: Path) -> None:
    write_tree(tmp_path, "a/1.JPG", "a/1.json", "b/2.json", ".DS_Store", "Thumbs.db", "README", "c/.hidden.png")
    refs, skipped = found(tmp_path)
    assert [ref.uri for ref in refs] == [f"file://{tmp_path}/a/1.JPG", f"file://{tmp_path}/c/.hidden.png"]
    assert refs[0] == ImageRef(f"file://{tmp_path}/a/1.JPG", 7, None, None, None)
    assert skipped == {".json": 2, ".DS_Store": 1, ".db": 1, "(no suffix)": 1}


def test_case_28_many_kinds_of_sidecars_stay_few_names(tmp_path: Path) -> None:
    write_tree(tmp_path, *(f"x.{i}" for i in range(1500)))
    skipped = found(tmp_path)[1]
    assert sum(skipped.values()) == 1500
    assert len(skipped) <= 1001


def test_case_26_same_name_in_two_folders(tmp_path: Path) -> None:
    write_tree(tmp_path, "a/1.jpg", "b/1.jpg")
    assert contents(tmp_path) == {f"file://{tmp_path}/{p}": p.encode() for p in ("a/1.jpg", "b/1.jpg")}


def test_case_27_awkward_keys_are_fetched(s3_server: S3Server, bucket: str) -> None:
    names = ["ü ñ.jpg", "a#b.jpg", "50%.jpg", "%41.jpg", "q?.jpg", "a+b.jpg", "_x.jpg", ".y.jpg"]
    for name in names:
        s3_server.put(f"{bucket}/{name}", name.encode())
    assert contents(bucket) == {f"{bucket}/{name}": name.encode() for name in names}


def test_a_glob_or_a_name_takes_what_it_names(tmp_path: Path) -> None:
    write_tree(tmp_path, "1.jpg", "2.bin", "d/3.bin")
    assert uris(f"{tmp_path}/*.bin") == [f"file://{tmp_path}/2.bin"]
    assert uris(tmp_path / "2.bin") == [f"file://{tmp_path}/2.bin"]
    assert uris(tmp_path) == [f"file://{tmp_path}/1.jpg"]


def test_a_text_list(tmp_path: Path) -> None:
    write_tree(tmp_path, "l/a b.jpg", "l/#1.bin", "l/sub/c", "up.jpg")
    lines = ["\ufeffa b.jpg", "", "#1.bin\r", f"{tmp_path}/up.jpg", "./sub/c", "../up.jpg", "  "]
    (tmp_path / "l/list.txt").write_text("\n".join(lines), newline="")
    names = ["l/#1.bin", "l/a b.jpg", "l/sub/c", "up.jpg", "up.jpg"]
    assert uris(tmp_path / "l/list.txt") == [f"file://{tmp_path}/{name}" for name in names]
    assert len(contents(tmp_path / "l/list.txt")) == 4


def test_lists_with_columns(tmp_path: Path, s3_server: S3Server, bucket: str) -> None:
    s3_server.put(f"{bucket}/x/1.jpg", b"one")
    s3_server.put(f"{bucket}/x/2.jpg", b"two")
    s3_server.put(f"{bucket}/x/list.csv", f"label,URL\n0,1.jpg\n1,{bucket}/x/2.jpg\n2,\n".encode())
    s3_server.put(f"{bucket}/x/only.csv", b"anything\n1.jpg\n")
    table = pa.table({"n": [1, 2, 3], "uri": ["1.jpg", f"{bucket}/x/2.jpg", None]})
    s3_server.put(f"{bucket}/x/list.parquet", parquet_bytes(table))
    both = {f"{bucket}/x/1.jpg": b"one", f"{bucket}/x/2.jpg": b"two"}
    assert contents(f"{bucket}/x/list.csv") == both
    assert contents(f"{bucket}/x/list.parquet") == both
    assert contents(f"{bucket}/x/only.csv") == {f"{bucket}/x/1.jpg": b"one"}
    assert found(f"{bucket}/x/list.parquet")[1] == {"(empty entry)": 1}
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    with pytest.raises(SettingsError, match=r"bad.csv.*uri or url or image"):
        found(tmp_path / "bad.csv")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\n")
    with pytest.raises(SettingsError, match="not UTF-8"):
        found(tmp_path / "bad.txt")


def test_a_damaged_list_is_said(tmp_path: Path) -> None:
    (tmp_path / "long.csv").write_text('url\n"' + "a" * 2**18)
    whole = io.BytesIO()
    pq.write_table(pa.table({"uri": ["a.jpg", "b.jpg"]}), whole)
    data = bytearray(whole.getvalue())
    data[4:24] = b"\xff" * 20  # the first page's header; the footer is whole, so it is a list
    (tmp_path / "cut.parquet").write_bytes(data)
    for name in ("long.csv", "cut.parquet"):
        with pytest.raises(SettingsError, match=f"the list .*{name} is damaged"):
            found(tmp_path / name)


def test_a_list_may_name_tars_and_parquet_files(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_bytes(("1.jpg", b"one")))
    (tmp_path / "b.parquet").write_bytes(parquet_bytes(hugging_face_table(1)))
    (tmp_path / "list.txt").write_text("a.tar\nb.parquet\nmissing.tar\n")
    by_uri = {ref.uri: ref for ref in found(tmp_path / "list.txt")[0]}
    assert fetch(by_uri[f"tar://1.jpg::file://{tmp_path}/a.tar"], max_bytes=9) == b"one"
    assert fetch(by_uri[f"parquet://0::file://{tmp_path}/b.parquet"], max_bytes=9) == b"image 0"
    assert status_of(by_uri[f"tar://::file://{tmp_path}/missing.tar"]) == Status.FETCH_FAILED


def test_names_that_are_not_utf8_are_counted(tmp_path: Path) -> None:
    (tmp_path / "\udcff.jpg").write_bytes(b"x")
    assert found(tmp_path) == ([], {"(name that is not UTF-8)": 1})


def test_case_23_a_missing_address_ends_it(tmp_path: Path, bucket: str) -> None:
    for address in (f"{tmp_path}/no", f"{bucket}/no", "s3://no-such-bucket-here"):
        with pytest.raises(StorageError, match=address):
            found(address)


# Fetching


def test_case_24_one_missing_image_is_a_row(tmp_path: Path, bucket: str) -> None:
    for missing in (f"file://{tmp_path}/no.jpg", f"{bucket}/no.jpg"):
        for size in (None, 5):
            assert status_of(ImageRef(missing, size, None, None, None)) == Status.FETCH_FAILED
        assert status_of(ImageRef("tar://m.jpg::" + missing, 5, None, missing, 512)) == Status.FETCH_FAILED
        assert status_of(ImageRef("parquet://0::" + missing, None, None, missing, 0)) == Status.FETCH_FAILED


def test_case_29_replaced_or_removed_after_listing(bucket: str) -> None:
    names = ["grown", "shrunk", "swapped", "removed"]
    for name in names:
        storage.write_atomic(f"{bucket}/{name}.jpg", b"12345")
    refs = {ref.uri.rpartition("/")[2]: ref for ref in found(bucket)[0]}
    storage.write_atomic(f"{bucket}/grown.jpg", b"123456")
    storage.write_atomic(f"{bucket}/shrunk.jpg", b"1234")
    storage.write_atomic(f"{bucket}/swapped.jpg", b"abcde")
    storage.delete(f"{bucket}/removed.jpg")
    for name in ("grown", "shrunk", "swapped"):
        assert status_of(refs[f"{name}.jpg"]) == Status.CHANGED
        without_version = refs[f"{name}.jpg"]._replace(etag=None)
        if name != "swapped":
            assert status_of(without_version) == Status.CHANGED
    assert status_of(refs["removed.jpg"]) == Status.FETCH_FAILED


def test_too_many_bytes_are_not_read(tmp_path: Path) -> None:
    write_tree(tmp_path, "12345.jpg")
    (ref,) = found(tmp_path)[0]
    assert fetch(ref, max_bytes=9) == b"12345.jpg"
    assert status_of(ref, max_bytes=8) == Status.TOO_LARGE
    assert status_of(ref._replace(size=None), max_bytes=8) == Status.TOO_LARGE
    assert fetch(ref._replace(size=None), max_bytes=9) == b"12345.jpg"
    missing = ref._replace(uri=f"file://{tmp_path}/no", size=100)
    assert status_of(missing, max_bytes=8) == Status.TOO_LARGE  # without a read


def test_an_empty_file_is_fetched_as_no_bytes(bucket: str) -> None:
    storage.write_atomic(f"{bucket}/0.jpg", b"")
    assert contents(bucket) == {f"{bucket}/0.jpg": b""}


# Tars


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_is_read_in_place(tmp_path: Path, format: int) -> None:  # noqa: A002
    long = "long/" * 18 + "x.png"
    members = [("./1.jpg", b"one" * 999), ("1.json", b"{}"), ("ü #%?.jpg", b""), (long, b"two"), ("d/1.jpg", b"3")]
    path = tmp_path / "sa_000000.tar"
    path.write_bytes(tar_bytes(*members, format=format))
    expected = {f"tar://{name}::file://{path}": data for name, data in members if name != "1.json"}
    assert contents(path) == contents(tmp_path) == expected
    refs, skipped = found(path)
    assert skipped == {".json": 1}
    for ref in refs:
        assert ref.container == f"file://{path}"
        assert path.read_bytes()[ref.position :][: ref.size] == expected[ref.uri]


def test_a_tar_on_s3_is_listed_by_ranges(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    members = [(f"{i}.jpg", bytes([i]) * 2_000_000) for i in range(8)]
    storage.write_atomic(f"{bucket}/a.tar", tar_bytes(*members))
    read = storage.read_bytes
    sizes = []

    def counted(*args: object, **kwargs: object) -> bytes:
        data = read(*args, **kwargs)  # type: ignore[arg-type]
        sizes.append(len(data))
        return data

    monkeypatch.setattr(storage, "read_bytes", counted)
    refs = found(bucket)[0]
    assert sum(sizes) < 16_000_000 / 3
    assert [fetch(ref, max_bytes=LIMIT) for ref in refs] == [data for _, data in members]
    storage.write_atomic(f"{bucket}/a.tar", tar_bytes(*reversed(members)))
    assert {status_of(ref) for ref in refs} == {Status.CHANGED}


def test_case_33_tar_with_climbing_path(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    with tarfile.open(folder / "evil.tar", "w") as tar:
        for name in ("../up.jpg", "/abs.jpg", "a/../../up.jpg", "good.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
        for name, kind in (("s.jpg", tarfile.SYMTYPE), ("h.jpg", tarfile.LNKTYPE), ("f.jpg", tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "good.jpg"
            tar.addfile(info)
    refs, skipped = found(folder)
    assert [ref.uri for ref in refs] == [f"tar://good.jpg::file://{folder}/evil.tar"]
    assert skipped == {"(tar member with a path out of the tar)": 3, "(tar member that is no regular file)": 3}
    assert [path.name for path in tmp_path.rglob("*")] == ["in", "evil.tar"]


MEMBERS = [(f"{i}.jpg", bytes([i]) * 3000) for i in range(5)]


@pytest.mark.parametrize("cut", [9000, 3584 * 2, 3584 * 2 + 100, 3584 * 5])
def test_case_33_a_cut_tar_gives_what_is_whole_and_one_failure(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "cut.tar"
    path.write_bytes(tar_bytes(*MEMBERS, format=tarfile.USTAR_FORMAT)[:cut])
    *whole, damage = found(path)[0]
    assert [fetch(ref, max_bytes=LIMIT) for ref in whole] == [data for _, data in MEMBERS[: cut // 3584]]
    assert damage == ImageRef(f"tar://::file://{path}", None, None, f"file://{path}", None)
    assert status_of(damage) == Status.TRUNCATED


def test_case_33_garbage_in_a_tar(tmp_path: Path) -> None:
    data = bytearray(tar_bytes(*MEMBERS, format=tarfile.USTAR_FORMAT))
    data[3584 * 2 : 3584 * 2 + 512] = b"\xab" * 512
    (tmp_path / "a.tar").write_bytes(data)
    *whole, damage = found(tmp_path / "a.tar")[0]
    assert len(whole) == 2
    assert status_of(damage) == Status.TRUNCATED
    for name, content in {"b.tar": b"<html>" * 1000, "c.tar": b"", "d.tar": b"short"}.items():
        (tmp_path / name).write_bytes(content)
        (damage,) = found(tmp_path / name)[0]
        assert status_of(damage) == Status.NOT_AN_IMAGE


def test_an_empty_tar_is_whole(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_bytes())
    assert found(tmp_path) == ([], {})


def test_the_last_tar_member_of_a_name_counts(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_bytes(("1.jpg", b"old"), ("1.jpg", b"new")))
    assert list(contents(tmp_path).values()) == [b"new"]
    assert found(tmp_path)[1] == {"(tar member replaced by a later one)": 1}


def test_compressed_tars_are_refused_or_counted(tmp_path: Path) -> None:
    write_tree(tmp_path, "a.tar.gz", "b.tgz", "c.jpg")
    assert found(tmp_path)[1] == {".tar.gz": 1, ".tgz": 1}
    assert found(f"{tmp_path}/*.*")[1] == {".tar.gz": 1, ".tgz": 1}
    with pytest.raises(SettingsError, match=r"a.tar.gz.*store it as .tar"):
        found(tmp_path / "a.tar.gz")


# Parquet


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()], ids=str)
@pytest.mark.parametrize("name", ["image", "bytes", "image_bytes", "jpg"])
def test_a_column_of_bytes(tmp_path: Path, name: str, kind: pa.DataType) -> None:
    table = pa.table({"id": [1, 2, 3], name: pa.array([b"a", b"bc", b""], kind)})
    (tmp_path / "x.parquet").write_bytes(parquet_bytes(table, rows=2))
    expected = {f"parquet://{i}::file://{tmp_path}/x.parquet": d for i, d in enumerate([b"a", b"bc", b""])}
    assert contents(tmp_path) == contents(tmp_path / "x.parquet") == expected


def test_hugging_face_images_on_s3(bucket: str) -> None:
    storage.write_atomic(f"{bucket}/data/x.parquet", parquet_bytes(hugging_face_table(10)))
    refs, skipped = found(bucket)
    assert skipped == {}
    assert {ref.position for ref in refs} == set(range(10))
    with ThreadPoolExecutor(8) as pool:
        data = list(pool.map(lambda ref: fetch(ref, max_bytes=100), refs))
    assert data == [b"image %d" % ref.position for ref in refs if ref.position is not None]
    assert status_of(refs[0], max_bytes=6) == Status.TOO_LARGE
    assert status_of(refs[4], max_bytes=6) == Status.TOO_LARGE
    storage.write_atomic(f"{bucket}/data/x.parquet", parquet_bytes(hugging_face_table(11)))
    assert status_of(refs[8]) == Status.CHANGED  # the third row group: two stay in memory


def test_a_row_group_is_read_once(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_atomic(f"{bucket}/x.parquet", parquet_bytes(hugging_face_table(12), rows=6))
    refs = sorted(found(bucket)[0], key=lambda ref: ref.position or 0)
    opened = []
    open_input = storage.open_input
    monkeypatch.setattr(storage, "open_input", lambda uri, **kw: opened.append(uri) or open_input(uri, **kw))
    assert [fetch(ref, max_bytes=100) for ref in refs] == [b"image %d" % i for i in range(12)]
    assert len(opened) == 3  # the footer and two row groups


def test_rows_without_bytes_and_files_without_images(tmp_path: Path) -> None:
    table = pa.table({"image": pa.array([b"x", None], pa.binary())})
    (tmp_path / "x.parquet").write_bytes(parquet_bytes(table))
    (tmp_path / "captions.parquet").write_bytes(parquet_bytes(pa.table({"text": ["a"], "n": [1]})))
    refs, skipped = found(tmp_path)
    assert skipped == {".parquet": 1}
    assert status_of(refs[1]) == Status.EMPTY_FILE
    with pytest.raises(SettingsError, match=r"numbers.parquet has neither images nor a column of URIs"):
        (tmp_path / "numbers.parquet").write_bytes(parquet_bytes(pa.table({"n": [1]})))
        found(tmp_path / "numbers.parquet")


def test_case_33_damaged_parquet_files(tmp_path: Path) -> None:
    whole = parquet_bytes(hugging_face_table(10))
    for name, data, status in (
        ("cut", whole[:-20], Status.TRUNCATED),
        ("html", b"<html>" * 99, Status.NOT_AN_IMAGE),
        ("empty", b"", Status.NOT_AN_IMAGE),
        ("body", whole[:20] + b"\xff" * 200 + whole[220:], None),
    ):
        path = tmp_path / f"{name}.parquet"
        path.write_bytes(data)
        if status is None:
            assert status_of(found(path)[0][0]) == Status.TRUNCATED
        else:
            (ref,) = found(path)[0]
            assert status_of(ref) == status
