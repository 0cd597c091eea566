"""Distributions of any number of values in fixed memory."""

import itertools
import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

MOST_BARS: Final = 40
_STEPS: Final = (1, 2, 4, 5)  # bins a bar, times a power of ten


@dataclass(frozen=True)
class Bar:
    """Values from `low` up to, but not including, `high`."""

    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Histogram:
    """Counts in bins of one width. Histograms of the same bins add up, in any order."""

    low: float
    """Where the first bin begins; smaller values are counted in it."""
    width: float
    counts_B: NDArray[np.int64]
    """A bin each; the last one also counts larger values."""
    sum: float = 0.0
    """Of the values, for their mean."""

    @classmethod
    def empty(cls, low: float, high: float, bins: int) -> "Histogram":
        """No values yet, in bins from `low` to `high`."""
        return cls(low, (high - low) / bins, np.zeros(bins, np.int64))

    def with_values(self, values: NDArray[Any]) -> "Histogram":
        """The same with more values; those that are not finite are left out."""
        values = values[np.isfinite(values)].astype(np.float64)
        # A thousandth of a bin more, so that what rounding moved below an edge counts above it.
        bins = np.floor((values - self.low) / self.width + 1e-3).clip(0, len(self.counts_B) - 1)
        counts_B = np.bincount(bins.astype(np.int64), minlength=len(self.counts_B))
        return self + Histogram(self.low, self.width, counts_B, float(values.sum()))

    def __add__(self, other: "Histogram") -> "Histogram":
        return Histogram(self.low, self.width, self.counts_B + other.counts_B, self.sum + other.sum)

    @property
    def count(self) -> int:
        """Of the values."""
        return int(self.counts_B.sum())

    @property
    def mean(self) -> float:
        """Of the values, exactly; NaN where there are none."""
        return self.sum / self.count if self.count else math.nan

    @property
    def median(self) -> float:
        """Where the bin begins that holds it; NaN where there are no values."""
        if not self.count:
            return math.nan
        place = int(np.searchsorted(self.counts_B.cumsum(), self.count / 2))
        return self.low + place * self.width

    def bars(self, most: int = MOST_BARS) -> list[Bar]:
        """Some bins together a bar, from the first to the last that holds a value; none where there are none."""
        [occupied] = self.counts_B.nonzero()
        if not len(occupied):
            return []
        for step in (factor * 10**power for power in itertools.count() for factor in _STEPS):
            first, last = occupied[0] // step, occupied[-1] // step
            if last - first < most:
                break
        edges = np.arange(first, last + 2) * step
        counts = np.add.reduceat(self.counts_B, edges[:-1])
        return [
            Bar(self.low + start * self.width, self.low + end * self.width, int(count))
            for start, end, count in zip(edges[:-1], edges[1:], counts, strict=True)
        ]
