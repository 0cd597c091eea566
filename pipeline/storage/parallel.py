"""A listing in parallel: of one request after another, each of which may say what else is to be listed."""

from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextvars import copy_context
from typing import Final, NamedTuple

from pipeline.storage.files import FileInfo

LISTERS: Final = 16
"""Requests under way at the same time."""


class Listed(NamedTuple):
    """What one request found. `more`: the requests that are left to make because of it."""

    files: list[FileInfo]
    more: "list[Request]"


Request = Callable[[], Listed]


def listed(first: Request, listers: int = LISTERS) -> Iterator[FileInfo]:
    """All files of a request and of those that follow from it, in no particular order.

    At most `listers` answers are in memory. A listing of one request starts no thread. A request that raises ends
    the listing, when those under way have ended.

    Args:
        first: The first request.
        listers: How many are made at the same time; 1 for what may not be called from other threads.
    """
    files, to_do = first()
    yield from files
    if listers == 1:
        while to_do:
            files, more = to_do.pop()()
            to_do += more
            yield from files
    if not to_do:
        return
    under_way: set[Future[Listed]] = set()
    answers: list[Listed] = []
    with ThreadPoolExecutor(listers, "list") as pool:
        while to_do or under_way:
            while to_do and len(under_way) < listers:
                under_way.add(pool.submit(copy_context().run, to_do.pop()))  # the context holds `at_most`
            for answer in answers:  # when the next are under way, as whoever takes the files may take time
                yield from answer.files
            done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
            answers = [request.result() for request in done]
            to_do += [request for answer in answers for request in answer.more]
    for answer in answers:
        yield from answer.files
