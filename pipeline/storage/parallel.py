"""A listing in parallel and in order, by requests of which each may say what else is to be listed."""

import heapq
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextvars import copy_context
from typing import Any, Final, NamedTuple

from pipeline.storage.files import FileInfo

LISTERS: Final = 16
"""Requests under way at the same time."""
FILES_AHEAD: Final = 100_000
"""Files at least that wait for others that come before them, until no more requests are made ahead."""


class Listed(NamedTuple):
    """What one request found, in order: files, and in the place of what is left to list a request."""

    items: "list[list[FileInfo] | Request]"


Request = Callable[[], Listed]


def in_order(found: "list[tuple[str, FileInfo | Request]]") -> Listed:
    """What a folder holds, by the names that decide the order: those of folders end in `/`."""
    items: list[list[FileInfo] | Request] = []
    for _, item in sorted(found, key=operator.itemgetter(0)):
        if not isinstance(item, FileInfo):
            items.append(item)
        elif items and isinstance(items[-1], list):
            items[-1].append(item)
        else:
            items.append([item])
    return Listed(items)


_Place = tuple[float, ...]
_LAST: Final[_Place] = (float("inf"),)


class _Waiting(NamedTuple):
    """Something in a heap. Those of the same place come in the order in which they were found."""

    place: _Place
    number: int
    item: Any
    """Files, or a request."""


def listed(first: Request, listers: int = LISTERS) -> Iterator[FileInfo]:
    """All files of a request and of those that follow from it, in order.

    What comes first is asked for first. A listing of one request starts no thread. A request that raises ends the
    listing, when those under way have ended.

    Args:
        first: The first request.
        listers: How many are made at the same time; 1 for what may not be called from other threads.
    """
    listing = _Listing()
    listing.add((), first())
    if listers == 1:
        while listing.requests:
            asked = listing.next_request()
            listing.add(asked.place, asked.item())
            yield from listing.ready([])
    under_way: dict[Future[Listed], _Place] = {}
    with ThreadPoolExecutor(listers, "list") as pool:
        while listing.requests or under_way:
            while listing.requests and len(under_way) < listers and listing.is_worth_asking(under_way.values()):
                place, _, request = listing.next_request()
                under_way[pool.submit(copy_context().run, request)] = place  # the context holds `at_most`
            yield from listing.ready(under_way.values())  # while the next are under way
            for answer in wait(under_way, return_when=FIRST_COMPLETED).done:
                listing.add(under_way.pop(answer), answer.result())
    yield from listing.ready([])


class _Listing:
    """What was found and what is left to ask, each by its place: what comes first has the smallest."""

    def __init__(self) -> None:
        self.requests: list[_Waiting] = []
        self._files: list[_Waiting] = []
        self._held = 0
        self._numbers = itertools.count()

    def add(self, place: _Place, answer: Listed) -> None:
        """Take what a request of this place has found."""
        # A next page takes the place of the page before, or places would be as long as there are pages.
        alone = not any(callable(item) for item in answer.items[:-1])
        for position, item in enumerate(answer.items):
            waiting = _Waiting(place if alone else (*place, position), next(self._numbers), item)
            if callable(item):
                heapq.heappush(self.requests, waiting)
            else:
                heapq.heappush(self._files, waiting)
                self._held += len(item)

    def next_request(self) -> _Waiting:
        """That of the smallest place."""
        return heapq.heappop(self.requests)

    def is_worth_asking(self, under_way: Iterable[_Place]) -> bool:
        """Whether the next request should be made now: something waits for it, or little waits."""
        return self._held < FILES_AHEAD or self.requests[0].place < min(under_way, default=_LAST)

    def ready(self, under_way: Iterable[_Place]) -> Iterator[FileInfo]:
        """The files that no request comes before: neither one that is left nor one under way."""
        first = min(itertools.chain(under_way, (request.place for request in self.requests[:1])), default=_LAST)
        while self._files and self._files[0].place <= first:
            files: list[FileInfo] = heapq.heappop(self._files).item
            self._held -= len(files)
            yield from files
