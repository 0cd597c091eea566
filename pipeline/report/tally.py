"""What the shards of a masks dataset hold, counted a row group at a time.

Tallies add up, so shards may be counted in any order and by several processes. A tally has the same size however
many images there are: counts, histograms, and the few images that a picture will be made of.
"""

import hashlib
import heapq
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline import rle, storage
from pipeline.errors import StorageError
from pipeline.report.histogram import Histogram
from pipeline.shard import read_footer, shard_uri
from schemas.masks import PROCESSED, Status

_EXAMPLES: Final = 5  # failed images named for each reason
_FAULTS: Final = 20  # unreadable shards named
_SMALLEST_SHARE: Final = 1e-7
_COLUMNS: Final = ["image_id", "uri", "status", "error", "height", "width", "masks"]


class Sampling(NamedTuple):
    """Which images are shown."""

    seed: int
    """The same seed gives the same sample of the same dataset."""
    sampled: int
    """Images drawn from all that were processed."""
    outliers: int
    """Images of each kind of outlier."""


class Ranked(NamedTuple):
    """An image that may be shown; those of the lowest rank are."""

    rank: float
    image_id: int


class Failure(NamedTuple):
    """A failed image; of each status the first ones are named."""

    image_id: int
    uri: str
    error: str


def _histograms() -> dict[str, Histogram]:
    return {
        "masks": Histogram.empty(0, 4096, 4096),
        "area": Histogram.empty(-7, 0, 140),
        "predicted_iou": Histogram.empty(0, 1.1, 220),
        "stability_score": Histogram.empty(0, 1, 200),
        "coverage": Histogram.empty(0, 1, 200),
    }


@dataclass(frozen=True)
class Tally:
    """What some shards hold."""

    statuses: Counter[str] = field(default_factory=Counter)
    masks: int = 0
    bytes: int = 0
    """Of the shards."""
    seconds: float = 0.0
    """That workers took for them."""
    funnel: Counter[str] = field(default_factory=Counter)
    """`pipeline.amg.funnel.Funnel`, of the shards that counted it."""
    uncounted: int = 0
    """Shards that were made before the funnel was counted."""
    histograms: dict[str, Histogram] = field(default_factory=_histograms)
    """Of images: `masks`, and `coverage`, the share of the picture in any mask. Of masks: `area`, the decadic
    logarithm of the share of the picture, `predicted_iou`, `stability_score`."""
    sample: tuple[Ranked, ...] = ()
    most: tuple[Ranked, ...] = ()
    """Images with the most masks."""
    empty: tuple[Ranked, ...] = ()
    """A sample of those with none."""
    unstable: tuple[Ranked, ...] = ()
    """Those whose masks have the lowest mean stability score."""
    failures: dict[str, tuple[Failure, ...]] = field(default_factory=dict)
    """Examples, by status."""
    faults: tuple[str, ...] = ()
    """Shards that cannot be read, with the reason; the first ones."""
    unread: int = 0
    """How many those are."""

    @property
    def images(self) -> int:
        """That have a row."""
        return self.statuses.total()

    def plus(self, other: "Tally", sampling: Sampling) -> "Tally":
        """Both together."""
        statuses = self.failures.keys() | other.failures.keys()
        return Tally(
            statuses=self.statuses + other.statuses,
            masks=self.masks + other.masks,
            bytes=self.bytes + other.bytes,
            seconds=self.seconds + other.seconds,
            funnel=_sum(self.funnel, other.funnel),
            uncounted=self.uncounted + other.uncounted,
            histograms={name: self.histograms[name] + other.histograms[name] for name in self.histograms},
            sample=_lowest(sampling.sampled, self.sample, other.sample),
            most=_lowest(sampling.outliers, self.most, other.most),
            empty=_lowest(sampling.outliers, self.empty, other.empty),
            unstable=_lowest(sampling.outliers, self.unstable, other.unstable),
            failures={
                status: _lowest(_EXAMPLES, self.failures.get(status, ()), other.failures.get(status, ()))
                for status in sorted(statuses)
            },
            faults=(*self.faults, *other.faults)[:_FAULTS],
            unread=self.unread + other.unread,
        )


def tally_shard(output: str, fingerprint: str, sampling: Sampling, shard: int) -> Tally:
    """Count one shard; where it is damaged or of another run, all of it is left out and named.

    Args:
        output: Canonical address of the dataset.
        fingerprint: The run's.
        sampling: Which images are to be shown.
        shard: Its number, of a shard that has a file.
    """
    uri = shard_uri(output, "masks", shard)
    try:
        footer, summary = read_footer(output, "masks", shard)
        if footer["fingerprint"] != fingerprint:
            return _left_out(uri, output, f"of another run, fingerprint {footer['fingerprint']}")
        tally = Tally(
            bytes=summary.bytes,
            seconds=summary.seconds,
            funnel=Counter(summary.funnel or {}),
            uncounted=int(summary.funnel is None),
        )
        with storage.open_input(uri) as file, pq.ParquetFile(file) as parquet:
            for group in range(parquet.num_row_groups):
                rows = parquet.read_row_group(group, columns=_COLUMNS)
                tally = tally.plus(tally_rows(rows, sampling), sampling)
    except (StorageError, pa.ArrowException, OSError, KeyError, ValueError) as error:
        return _left_out(uri, output, storage.redact(str(error)))
    return tally


def _left_out(uri: str, output: str, why: str) -> Tally:
    return Tally(faults=(f"{uri.removeprefix(f'{output}/')}: {why}",), unread=1)


def tally_rows(rows: pa.Table, sampling: Sampling) -> Tally:
    """Count some rows of `schemas.masks.MASKS_SCHEMA`."""
    images = rows.drop_columns("masks").to_pylist()
    ends = np.cumsum(pc.list_value_length(rows["masks"]).to_numpy())
    flat: Any = pc.list_flatten(rows["masks"])
    of_masks = flat.combine_chunks()
    area, predicted_iou, stability = (
        of_masks.field(name).to_numpy() for name in ("area", "predicted_iou", "stability_score")
    )
    rles = of_masks.field("segmentation").to_pylist()
    tally = Tally(statuses=Counter(image["status"] for image in images), masks=len(of_masks))
    shares, counts, coverages = [np.zeros(0)], [], []
    sample, most, empty, unstable = list[Ranked](), list[Ranked](), list[Ranked](), list[Ranked]()
    for image, start, end in zip(images, [0, *ends[:-1]], ends, strict=True):
        if image["status"] not in PROCESSED:
            continue
        image_id, count, pixels = image["image_id"], int(end - start), image["height"] * image["width"]
        ranked = Ranked(_random(sampling.seed, image_id), image_id)
        sample.append(ranked)
        counts.append(count)
        coverages.append(rle.covered(rles[start:end]) / pixels)
        shares.append(area[start:end] / pixels)
        if image["status"] == Status.EMPTY:
            empty.append(ranked)
        else:
            most.append(Ranked(-count, image_id))
            unstable.append(Ranked(_mean(stability[start:end]), image_id))
    values = {
        "masks": np.array(counts),
        "area": np.log10(np.concatenate(shares).clip(_SMALLEST_SHARE)),
        "predicted_iou": predicted_iou,
        "stability_score": stability,
        "coverage": np.array(coverages),
    }
    chosen = Tally(
        histograms={name: empty_.with_values(values[name]) for name, empty_ in _histograms().items()},
        sample=tuple(sample),
        most=tuple(most),
        empty=tuple(empty),
        unstable=tuple(unstable),
        failures=_failures(images),
    )
    return tally.plus(chosen, sampling)


def _failures(images: list[dict[str, Any]]) -> dict[str, tuple[Failure, ...]]:
    failures: dict[str, list[Failure]] = {}
    for image in images:
        if image["status"] not in PROCESSED:
            failure = Failure(image["image_id"], storage.redact(image["uri"]), image["error"] or "")
            failures.setdefault(image["status"], []).append(failure)
    return {status: tuple(some) for status, some in failures.items()}


def _mean(scores: NDArray[Any]) -> float:
    """Of those that are numbers; a mask without one counts as stable nowhere."""
    return float(np.nan_to_num(scores).mean())


def _random(seed: int, image_id: int) -> float:
    """The rank of an image in a sample: those with the lowest are a random sample, whatever the order."""
    digest = hashlib.blake2b(f"{seed} {image_id}".encode(), digest_size=6).digest()
    return float(int.from_bytes(digest))


def _lowest(count: int, *parts: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(heapq.nsmallest(count, (item for part in parts for item in part)))


def _sum(one: Counter[str], two: Counter[str]) -> Counter[str]:
    """With the zeros, which `+` drops."""
    total = Counter(one)
    total.update(two)
    return total
