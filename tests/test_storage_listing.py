"""Listing on local disk and on a real S3 server: awkward names, globs, links, what is not there."""

from pathlib import Path

import pytest
from s3server import S3Server

from pipeline import storage
from pipeline.errors import StorageError

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


def test_case_23_a_folder_that_cannot_be_listed(tmp_path: Path) -> None:
    """By a link to itself, as a folder without permissions is open to root."""
    write_tree(tmp_path, "in/1.jpg")
    (tmp_path / "in/loop").symlink_to("loop")
    for address in (tmp_path, tmp_path / "in/loop"):
        with pytest.raises(StorageError, match=f"cannot list {tmp_path}/in.*symbolic links.*loop"):
            list(storage.list_files(str(address)))
