"""The simulated store: pages, order, delimiters and where to go on are those of an object store."""

from pathlib import Path

import fsspec
import pytest
from simulated_store import PAGE_KEYS, SimulatedStore


def whole(store: SimulatedStore, prefix: str, delimiter: str = "") -> tuple[list[str], list[str]]:
    """Every key and common prefix, a page after another."""
    keys: list[str] = []
    prefixes: list[str] = []
    after: str | None = ""
    while after is not None:
        page = store.page(prefix, delimiter=delimiter, start_after=after)
        assert len(page.keys) + len(page.prefixes) <= PAGE_KEYS
        keys += page.keys
        prefixes += page.prefixes
        after = page.after
    return keys, prefixes


def test_pages_hold_every_key_once_in_order() -> None:
    store = SimulatedStore(keys=4321, prefixes=7, shards=1200, skip_instance_cache=True)
    keys, prefixes = whole(store, "")
    assert len(keys) == len(set(keys)) == 5521
    assert keys == sorted(keys, key=str.encode)
    assert not prefixes
    assert store.pages == 6
    assert whole(store, "in/000003/")[0] == [key for key in keys if key.startswith("in/000003/")]
    assert store.page("in/", start_after=keys[10]).keys[0] == keys[11]
    assert store.page("nothing") == ([], [], None)


def test_a_delimiter_rolls_folders_up() -> None:
    store = SimulatedStore(keys=10**9, prefixes=2500, shards=3, skip_instance_cache=True)
    keys, prefixes = whole(store, "in/", "/")
    assert keys == []
    assert prefixes == [f"in/{folder:06d}/" for folder in range(2500)]
    assert store.pages == 3
    assert whole(store, "", "/") == ([], ["in/", "out/"])


def test_fsspec_reaches_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(fsspec.config.conf, "simulated", {"keys": 30, "prefixes": 3})
    fs, path = fsspec.url_to_fs("simulated://bucket/in")
    assert fs.ls(path, detail=False) == [f"bucket/in/{folder:06d}" for folder in range(3)]
    assert len(fs.find(path)) == 30
    assert fs.info("bucket/in/000001/000000010.jpg")["type"] == "file"
    assert fs.isdir("bucket/in/000001")
    with pytest.raises(FileNotFoundError):
        fs.ls("bucket/nothing")
