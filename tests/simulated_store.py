"""An object store whose keys are made up as they are listed, so that 100 million of them need no room.

`simulated://BUCKET/in/000042/000420007.jpg` are images, spread evenly over prefixes, and
`simulated://BUCKET/out/masks/part-00042.parquet` the shards of a run. It lists as object stores do: 1,000 keys a
page, in the order of their UTF-8 bytes, each page after a stated time. Nothing can be read or written.

How many there are is said in `fsspec.config.conf["simulated"]`, as arguments of `SimulatedStore`.
"""

import asyncio
import bisect
from functools import cached_property
from typing import Any, ClassVar, Final, NamedTuple

import fsspec
from fsspec.asyn import AsyncFileSystem

PAGE_KEYS: Final = 1000
SIZE: Final = 150_000


class Page(NamedTuple):
    """Keys and common prefixes of one page. `after` is where the next one starts; None at the end."""

    keys: list[str]
    prefixes: list[str]
    after: str | None


class SimulatedStore(AsyncFileSystem):  # type: ignore[misc]  # fsspec has no types
    """All of it. `pages` and `most_at_once`: how many were asked for, and how many of folders at the same time."""

    protocol: ClassVar[str] = "simulated"

    def __init__(
        self, keys: int = 0, prefixes: int = 1, shards: int = 0, page_seconds: float = 0.0, **options: Any
    ) -> None:
        """Make up a store.

        Args:
            keys: Images.
            prefixes: Folders that they are spread over.
            shards: Files in `out/masks`.
            page_seconds: How long a page takes, whoever else lists.
            options: fsspec's.
        """
        super().__init__(**options)
        self.pages = self.most_at_once = self._at_once = 0
        self._images, self._prefixes, self._shards, self._page_seconds = keys, prefixes, shards, page_seconds

    def page(self, prefix: str, *, delimiter: str = "", start_after: str = "") -> Page:
        """What a store answers to one request, without the time it takes."""
        self.pages += 1
        everything = range(self._images + self._shards)
        at = bisect.bisect_left(everything, prefix, key=self._key)
        if start_after:
            at = max(at, bisect.bisect_right(everything, start_after, key=self._key))
        keys: list[str] = []
        prefixes: list[str] = []
        after = ""
        while at < len(everything) and (key := self._key(at)).startswith(prefix):
            if len(keys) + len(prefixes) == PAGE_KEYS:
                return Page(keys, prefixes, after)
            if delimiter and (end := key.find(delimiter, len(prefix))) >= 0:
                prefixes.append(key[: end + len(delimiter)])
                after = f"{prefixes[-1]}\U0010ffff"
                at = bisect.bisect_left(everything, after, at, key=self._key)
            else:
                keys.append(key)
                after = key
                at += 1
        return Page(keys, prefixes, None)

    def _key(self, index: int) -> str:
        if index >= self._images:
            return self._shard_keys[index - self._images]
        return f"in/{index * self._prefixes // self._images:06d}/{index:09d}.jpg"

    @cached_property
    def _shard_keys(self) -> list[str]:
        return sorted(f"out/masks/part-{shard:05d}.parquet" for shard in range(self._shards))

    async def _ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        bucket, _slash, folder = path.strip("/").partition("/")
        prefix = f"{folder}/" if folder else ""
        entries: list[dict[str, Any]] = []
        after: str | None = ""
        while after is not None:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            await asyncio.sleep(self._page_seconds)
            self._at_once -= 1
            keys, prefixes, after = self.page(prefix, delimiter="/", start_after=after)
            entries += [self._file(f"{bucket}/{key}") for key in keys]
            entries += [_folder(f"{bucket}/{below[:-1]}") for below in prefixes]
        if not entries:
            raise FileNotFoundError(path)
        return entries if detail else [entry["name"] for entry in entries]

    async def _info(self, path: str, **_: Any) -> dict[str, Any]:
        key = path.partition("/")[2].rstrip("/")
        if (found := self.page(key)).keys[:1] == [key]:
            return self._file(path)
        if not found.keys:
            raise FileNotFoundError(path)
        return _folder(path)

    @staticmethod
    def _file(name: str) -> dict[str, Any]:
        return {"name": name, "type": "file", "size": SIZE, "ETag": f'"{name[-13:-4]:0>32}"'}


def _folder(name: str) -> dict[str, Any]:
    return {"name": name, "type": "directory", "size": 0}


fsspec.register_implementation("simulated", SimulatedStore)
