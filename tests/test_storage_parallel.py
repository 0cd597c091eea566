"""Listing in parallel finds what listing in a row finds, on a real S3 server and on a simulated store."""

import random
import threading
import time
from collections import Counter
from datetime import UTC
from functools import partial
from pathlib import Path

import fsspec
import pytest
import simulated_store  # noqa: F401 (registers the store)
from botocore.utils import parse_timestamp
from faulty_proxy import Fault, FaultyProxy
from s3server import S3Server

from pipeline import storage
from pipeline.errors import StorageError
from pipeline.manifest import write_manifest
from pipeline.sources import ImageRef, find_images
from pipeline.storage import attempts, parallel, s3
from pipeline.storage.files import FileInfo
from pipeline.storage.parallel import LISTERS, Listed, Request, listed

LARGE = [f"in/{folder}/{index:04d}.jpg" for folder in ("a", "b/c", "b/d") for index in range(350)]
LARGE += ["in/1.jpg", "in/z.jpg", "in/b/", "in/b/Größe/日本.jpg", "in/b/what?.jpg", "in/empty/"]
SMALL = [f"small/{folder:04d}/{index}.jpg" for folder in range(510) for index in range(2)]


@pytest.fixture(scope="module")
def filled(s3_server: S3Server) -> str:
    """A bucket with large folders and with many small ones."""
    bucket = s3_server.make_bucket()
    s3_server.client().pipe({f"{bucket}/{key}": b"x" for key in (*LARGE, *SMALL) if not key.endswith("/")})
    for key in LARGE:
        if key.endswith("/"):
            s3_server.put(f"{bucket}/{key}", b"")
    return bucket


def requests_for(proxy: FaultyProxy, uri: str) -> tuple[list[str], int]:
    """What is listed, sorted, and by how many requests for pages."""
    before = len(proxy.exchanges)
    found = sorted(file.uri for file in storage.list_files(uri))
    return found, sum("list-type=2" in exchange.request for exchange in proxy.exchanges[before:])


def test_large_folders_on_s3_are_listed_each(proxy: FaultyProxy, filled: str) -> None:
    found, requests = requests_for(proxy, f"{filled}/in")
    assert found == sorted(f"{filled}/{key}" for key in LARGE if not key.endswith("/"))
    assert requests == 5  # what is there, its folders, and each of a/, b/, empty/; b/ fits into a page
    listing = [request for exchange in proxy.exchanges if "delimiter=%2F" in (request := exchange.request)]
    assert len(listing) == 1


def test_the_manifest_of_a_parallel_listing_is_that_of_a_listing_in_a_row(
    s3_server: S3Server, filled: str, tmp_path: Path
) -> None:
    pages = s3_server.client().find(f"{filled}/in", detail=True)
    in_a_row = [
        ImageRef(f"s3://{key}", entry["size"], entry["ETag"], None, None)
        for key, entry in pages.items()
        if not key.endswith("/") and entry["type"] == "file"
    ]
    expected = write_manifest(
        [ref for ref in in_a_row if ref.uri.endswith(".jpg")], str(tmp_path / "a"), images_per_shard=100
    )
    found = write_manifest(find_images(f"{filled}/in", Counter()), str(tmp_path / "b"), images_per_shard=100)
    assert found == expected
    assert found.images == 1054


def test_times_of_a_listing_are_botocores_and_read_in_a_shorter_way(proxy: FaultyProxy, filled: str) -> None:
    entry = s3._page(filled, filled.removeprefix("s3://"), "in/1.jpg")["Contents"][0]["LastModified"]
    assert entry.tzinfo is UTC  # botocore's is dateutil's
    for text in (
        "2026-01-02T03:04:05.678Z",
        "2026-01-02T03:04:05Z",
        "Fri, 02 Jan 2026 03:04:05 GMT",
        "1767323045",
    ):
        assert s3._timestamp(text) == parse_timestamp(text)
    assert s3._timestamp(1767323045) == parse_timestamp(1767323045)


def test_small_folders_are_listed_in_a_row(proxy: FaultyProxy, filled: str) -> None:
    found, requests = requests_for(proxy, f"{filled}/small")
    assert found == sorted(f"{filled}/{key}" for key in SMALL)
    assert requests == 2


def test_more_folders_than_some_pages_hold_are_listed_in_a_row(
    proxy: FaultyProxy, filled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "_FOLDER_PAGES", 0)
    found, requests = requests_for(proxy, f"{filled}/in")
    assert found == sorted(f"{filled}/{key}" for key in LARGE if not key.endswith("/"))
    assert requests == 3


def test_throttled_requests_are_made_again_and_refused_ones_end_the_listing(
    proxy: FaultyProxy, filled: str
) -> None:
    proxy.spoil(Fault.SLOW_DOWN, 1)
    assert len(list(storage.list_files(f"{filled}/in"))) == 1054
    listing = s3.walk(f"{filled}/in", "", None)
    proxy.spoil(Fault.FORBIDDEN, 100)
    with pytest.raises(StorageError, match=f"cannot list {filled}/in: .*Access Denied"):
        list(listing)
    proxy._faults.clear()


def test_a_simulated_store_is_listed_by_several_and_gives_the_same_manifest(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arguments = {"keys": 20_000, "prefixes": 40, "page_seconds": 0.01}
    monkeypatch.setitem(fsspec.config.conf, "simulated", arguments)
    images = find_images("simulated://bucket/in", Counter())
    found = write_manifest(images, str(tmp_path / "a"), images_per_shard=256)
    store = fsspec.filesystem("simulated", use_listings_cache=False)
    assert 1 < store.most_at_once <= LISTERS
    in_a_row = (
        ImageRef(f"simulated://{entry['name']}", entry["size"], entry["ETag"], None, None)
        for folder in range(40)
        for entry in store.ls(f"bucket/in/{folder:06d}")
    )
    assert found == write_manifest(in_a_row, str(tmp_path / "b"), images_per_shard=256)
    assert found.images == 20_000


def tree(depth: int, made: list[str], name: str = "r") -> Listed:
    """A request that finds a file and, down to a depth, ten more requests."""
    made.append(threading.current_thread().name)
    more = [partial(tree, depth - 1, made, f"{name}{below}") for below in range(10)] if depth else []
    return Listed([[FileInfo(name, 1, None)], *more])


@pytest.mark.parametrize("listers", [1, 3, LISTERS])
def test_every_request_is_made_once(listers: int) -> None:
    made: list[str] = []
    found = [file.uri for file in listed(partial(tree, 2, made), listers)]
    assert len(found) == len(set(found)) == len(made) == 111
    assert found == sorted(found)
    assert len(set(made)) <= listers + 1


def test_one_request_starts_no_thread_and_whoever_stops_has_asked_for_little() -> None:
    made: list[str] = []
    assert len(list(listed(partial(tree, 0, made)))) == 1
    assert made == [threading.current_thread().name]
    made.clear()
    listing = listed(partial(tree, 2, made), 4)
    assert next(listing).uri == "r"
    next(listing)
    listing.close()  # type: ignore[attr-defined]
    assert len(made) <= 1 + 3 * 4


def test_requests_in_threads_know_how_long_to_try() -> None:
    known: list[float] = []

    def request() -> Listed:
        known.append(attempts._at_most_s.get())
        return Listed([request] if len(known) < 3 else [])

    with storage.at_most(7.0):
        assert list(listed(request)) == []
    assert known == [7.0] * 3


def test_what_a_request_raises_ends_the_listing() -> None:
    def refused() -> Listed:
        raise StorageError("no")

    with pytest.raises(StorageError, match="no"):
        list(listed(lambda: Listed([refused])))


@pytest.mark.parametrize("listers", [1, 3, LISTERS])
def test_files_come_in_order_however_long_requests_take(listers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of several folders, files between these, and folders in folders; a few files fill what waits."""
    monkeypatch.setattr(parallel, "FILES_AHEAD", 5)
    draw = random.Random(0)

    def folder(name: str, depth: int) -> Listed:
        time.sleep(draw.random() / 100)
        items: list[list[FileInfo] | Request] = [[FileInfo(f"{name}/a", 1, None)]]
        if depth:
            items += [partial(folder, f"{name}/b{below}", depth - 1) for below in range(3)]
        items += [[FileInfo(f"{name}/c{index}", 1, None) for index in range(3)], partial(pages, f"{name}/d", 0)]
        return Listed(items)

    def pages(name: str, page: int) -> Listed:
        time.sleep(draw.random() / 100)
        more = [partial(pages, name, page + 1)] if page < 4 else []
        return Listed([[FileInfo(f"{name}/{page}{index}", 1, None) for index in range(2)], *more])

    found = [file.uri for file in listed(partial(folder, "r", 2), listers)]
    assert len(found) == (1 + 3 + 10) * (1 + 3 + 9)
    assert found == sorted(found)


def test_little_is_asked_for_ahead_of_what_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the first of many folders takes its time, the others fill what may wait, and no more."""
    monkeypatch.setattr(parallel, "FILES_AHEAD", 50)
    asked: list[int] = []
    goes_on = threading.Event()

    def folder(index: int) -> Listed:
        asked.append(index)
        if index == 0:
            assert goes_on.wait(60)
        return Listed([[FileInfo(f"{index:03d}/{file}", 1, None) for file in range(10)]])

    def release() -> None:
        deadline = time.monotonic() + 60
        while len(asked) < 6 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        goes_on.set()

    threading.Thread(target=release).start()
    listing = listed(lambda: Listed([partial(folder, index) for index in range(200)]))
    assert next(listing).uri == "000/0"
    assert len(asked) <= 5 + 2 * LISTERS
    assert [file.uri for file in listing][-1] == "199/9"


def test_s3_and_other_stores_are_listed_in_order(
    proxy: FaultyProxy, filled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("in", "small"):
        found = [file.uri for file in storage.list_files(f"{filled}/{folder}")]
        assert found == sorted(found)
    monkeypatch.setitem(fsspec.config.conf, "simulated", {"keys": 5_000, "prefixes": 40, "page_seconds": 0.01})
    found = [file.uri for file in storage.list_files("simulated://bucket/in")]
    assert found == sorted(found)
    assert len(found) == 5_000
    memory = fsspec.filesystem("memory")
    for name in ("a/1", "a/2", "a-b", "a.jpg", "a0", "b"):
        memory.pipe(f"/order/{name}", b"x")
    found = [file.uri for file in storage.list_files("memory://order")]
    assert found == sorted(found)
    assert len(found) == 6
