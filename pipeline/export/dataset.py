"""A finished run of masks as an export reads it, and the account that it gives."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import PurePosixPath
from typing import Any, Final, NamedTuple, TypeVar

from pipeline import documents, storage
from pipeline.contents import Row
from pipeline.shard import read_rows
from pipeline.sources.refs import path_of
from schemas.masks import PROCESSED

CATEGORY: Final = "object"
"""The one name for all masks: they have no classes."""
_NAMED: Final = 1000
_AT_ONCE: Final = 64
_MEMBER: Final = re.compile(r"tar://(.+?)::")
_WILDCARD: Final = re.compile(r"[*?\[]")
_Item = TypeVar("_Item")


class Exported(NamedTuple):
    """What became of one image."""

    written: bool
    """Whether the image is in the export."""
    masks: int
    """Of its masks those that are."""
    left_out: list[tuple[str, str]]
    """What was not: why, and which."""
    text: str = ""
    """For a file of all images."""
    ious: tuple[float, ...] = ()
    """Of each of the image's masks with what was written of it, where that is not the mask itself."""


@dataclass
class Account:
    """What was written and what was not, and why; the first of these by name."""

    images: int = 0
    masks: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    named: list[str] = field(default_factory=list)

    def leave_out(self, why: str, what: str) -> None:
        """Count something that is not in the export."""
        self.left_out[why] += 1
        if len(self.named) < _NAMED:
            self.named.append(f"{what}: {why}")

    def add(self, exported: Exported) -> None:
        """Count an image."""
        self.images += exported.written
        self.masks += exported.masks
        for why, what in exported.left_out:
            self.leave_out(why, what)

    def document(self) -> dict[str, Any]:
        """The account as JSON."""
        return {"images": self.images, "masks": self.masks, "left_out": dict(self.left_out), "named": self.named}


class Dataset:
    """The rows of a run, one after another; a row group in memory at a time."""

    def __init__(self, output: str) -> None:
        """Look at a run.

        Args:
            output: The run's, canonical.

        Raises:
            OutputConflict: it holds no run of masks.
            SettingsError: shards are missing.
            StorageError: it cannot be read.
        """
        self.output = output
        self.document = documents.read_finished_masks(output)

    def rows(self, account: Account | None = None, columns: list[str] | None = None) -> Iterator[Row]:
        """The rows of images that were processed, in order.

        Args:
            account: Counts those of images that failed.
            columns: Names of those to read, `status` and `uri` among them; all by default.

        Raises:
            StorageError: a shard cannot be read, or is damaged.
        """
        for shard in range(self.document["manifest"]["shards"]):
            for row in read_rows(self.output, "masks", shard, columns):
                if row["status"] in PROCESSED:
                    yield row
                elif account is not None:
                    account.leave_out(f"image {row['status']}", storage.redact(row["uri"]))

    def file_name(self, uri: str) -> str:
        """`file_name` of an image of this run."""
        return file_name(uri, self.document["determinants"]["images"])


def file_name(uri: str, images: str) -> str:
    """An image's name as readers of an export look for it: below the input, in its tar, or else its address.

    Args:
        uri: The image's.
        images: What the run was given as --images.
    """
    if member := _MEMBER.match(uri):
        return member[1]
    folder = _WILDCARD.split(images, maxsplit=1)[0]
    if folder != images:
        folder = folder.rpartition("/")[0]
    return uri.removeprefix(f"{folder}/") if uri.startswith(f"{folder}/") else storage.redact(uri)


class Named(NamedTuple):
    """A row and the file that an export makes of it."""

    name: str
    taken: bool
    """Whether another image has a file of this name, as of `a.png` beside `a.jpg`."""
    row: Row


def named_rows(dataset: Dataset, account: Account, suffix: str, reserved: Iterable[str] = ()) -> Iterator[Named]:
    """Each row that was processed, with its file named as the image is.

    Names stay in memory, about 100 bytes each.

    Args:
        dataset: The run.
        account: Counts images that failed.
        suffix: Takes the place of the image's own.
        reserved: Names that no image's file may have.
    """
    names = set(reserved)
    for row in dataset.rows(account):
        name = own_name(dataset.file_name(row["uri"]), row["image_id"], suffix)
        yield Named(name, name in names, row)
        names.add(name)


def own_name(file_name: str, image_id: int, suffix: str) -> str:
    """An image's name with another suffix; its number where it has none that a file may have.

    Args:
        file_name: As `file_name` says it. Of a whole address the protocol is left out.
        image_id: Takes the place of an address with a query.
        suffix: The new one, with its dot.
    """
    parts = [part for part in path_of(file_name).split("/") if part not in {"", ".", ".."}]
    if not parts or ("://" in file_name and "?" in file_name):
        return f"{image_id}{suffix}"
    return str(PurePosixPath(*parts).with_suffix(suffix))


def export_each(
    items: Iterable[_Item], export: Callable[[_Item], Exported], account: Account, *, threads: int
) -> Iterator[Exported]:
    """Export an image after another, some in threads at the same time; what became of them, in order.

    Args:
        items: One an image.
        export: What to do with each.
        account: Counts them.
        threads: Images at the same time.
    """
    items = iter(items)
    with ThreadPoolExecutor(threads, "export") as pool:
        while some := list(islice(items, _AT_ONCE)):
            for exported in pool.map(export, some):
                account.add(exported)
                yield exported


def too_many(row: Row, most: int) -> Exported | None:
    """What becomes of an image with more masks than a picture of numbers can tell apart; None of another."""
    if len(row["masks"]) <= most:
        return None
    return Exported(False, 0, [(f"image of more than {most} masks", f"image {row['image_id']}")])


def number_or_none(score: float) -> float | None:
    """JSON has no NaN."""
    return score if score == score else None  # noqa: PLR0124 (NaN alone is not itself)
