"""Every image under an address: in folders, in lists of URIs, in tars and in Parquet files."""

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, NamedTuple

from pipeline import storage
from pipeline.errors import SettingsError
from pipeline.images import IMAGE_SUFFIXES
from pipeline.sources import lists
from pipeline.sources.containers import OPENERS, Opened
from pipeline.sources.refs import COMPRESSED_TARS, NOT_UTF8, ImageRef, is_storable, label_of, suffix_of
from pipeline.storage import FileInfo

LISTERS: Final = 16
"""Tars and Parquet files listed at the same time: a tar costs one small read a member."""

_WAITING: Final = 10_000  # images behind containers
_SKIPPED_NAMES: Final = 1000


class _Named(NamedTuple):
    """A file to look at. `explicit`: the user named it, so it is an image whatever its suffix."""

    file: FileInfo
    explicit: bool


def find_images(address: str, skipped: Counter[str]) -> Iterator[ImageRef]:
    """Every image under an address, in the order in which `storage.list_files` or a list has the files.

    The address is a folder or prefix, a glob, a tar, a Parquet file with images in it, one image, or a
    list of URIs: a `.txt` (one a line), a `.csv` with a header or a `.parquet` (the column `uri`, `url` or
    `image`, or the only one). Entries of a list are addresses as in `storage`, or relative to the list's
    folder. A glob or a list takes what it names; a folder gives what has an image's suffix. Tars, and Parquet
    files with a column of images, are opened in each of them. `skipped` counts the rest: by suffix, dot-files
    by name.

    Raises:
        StorageError: the address cannot be listed, or a file in it not read after several attempts.
        SettingsError: a list has no column of URIs, or the address is a compressed tar.
    """
    waiting: deque[Future[Opened] | ImageRef] = deque()  # those after a container that is being opened
    opening = 0
    with ThreadPoolExecutor(LISTERS, thread_name_prefix="list") as pool:
        for file, explicit in _named_files(storage.canonical_uri(address), skipped):
            suffix = suffix_of(file.uri)
            if not is_storable(file.uri):
                _skip(skipped, NOT_UTF8)
            elif suffix in OPENERS:
                waiting.append(pool.submit(OPENERS[suffix], file))
                opening += 1
            elif (explicit or suffix in IMAGE_SUFFIXES) and not file.uri.lower().endswith(COMPRESSED_TARS):
                image = ImageRef(*file, None, None)
                if waiting:
                    waiting.append(image)
                else:
                    yield image
            else:
                _skip(skipped, label_of(file.uri))
            while opening > LISTERS or len(waiting) > _WAITING or (waiting and not opening):
                first = waiting.popleft()
                opening -= isinstance(first, Future)
                yield from _refs(first, skipped)
        for last in waiting:
            yield from _refs(last, skipped)


def _named_files(uri: str, skipped: Counter[str]) -> Iterator[_Named]:
    for file in storage.list_files(uri):
        if file.uri != uri:  # below a folder, or a match of a glob
            yield _Named(file, explicit=not file.uri.startswith(f"{uri.rstrip('/')}/"))
        elif lists.is_list(file):
            for entry in lists.entries(uri):
                if entry:
                    yield _Named(FileInfo(entry, None, None), explicit=True)
                else:
                    _skip(skipped, "(empty entry)")
        elif uri.lower().endswith(COMPRESSED_TARS):
            raise SettingsError(
                f"{storage.redact(uri)}: compressed tars cannot be read in parts; store it as .tar"
            )
        else:
            yield _Named(file, explicit=True)


def _refs(found: Future[Opened] | ImageRef, skipped: Counter[str]) -> Iterable[ImageRef]:
    """An image, or a container's, which may have to be waited for."""
    if isinstance(found, ImageRef):
        return [found]
    refs, left_out = found.result()
    for name, count in left_out.items():
        _skip(skipped, name, count)
    return refs


def _skip(skipped: Counter[str], name: str, count: int = 1) -> None:
    # Numbered suffixes could be millions.
    skipped[name if name in skipped or len(skipped) < _SKIPPED_NAMES else "(other)"] += count
