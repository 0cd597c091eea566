"""In which order a dataset is gone through, and which part of it is whose. Pure arithmetic."""

from typing import NamedTuple

import numpy as np

from pipeline.errors import SettingsError


def dealt(count: int, part: int, parts: int, *, seed: int | None, epoch: int) -> list[int]:
    """Of the numbers 0 to `count` - 1 those of one part, in an order that is the seed's and the epoch's.

    Those of all parts are disjoint and together all; some parts may have one more than others. Without a seed they
    ascend.

    Raises:
        SettingsError: there is no such part.
    """
    if not 0 <= part < parts:
        raise SettingsError(f"rank {part} of {parts} workers; ranks begin with 0")
    if seed is None:
        return list(range(part, count, parts))
    order: list[int] = np.random.default_rng([seed, epoch]).permutation(count).tolist()
    return order[part::parts]


class At(NamedTuple):
    """Where one of a DataLoader's workers is: what is behind."""

    worker: int = 0
    workers: int = 1
    epoch: int = 0
    group: int = 0
    """Groups of the epoch that are behind."""
    row: int = 0
    """Rows of the next group that are behind."""
