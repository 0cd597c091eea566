"""Work on many shards by several processes."""

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

_Result = TypeVar("_Result")


@contextmanager
def mapping(processes: int) -> Iterator[Callable[[Callable[[int], _Result], Iterable[int]], Iterable[_Result]]]:
    """`map` by so many processes, in order; by this one where it is one."""
    if processes <= 1:
        yield map
        return
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool.map
