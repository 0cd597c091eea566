"""What is in a run's output against what belongs there: what is left to do, and `summary.json` at the end."""

from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import pyarrow as pa

from pipeline import storage
from pipeline.documents import as_json, shards_done
from pipeline.errors import EverymaskError, IncompleteRun
from pipeline.plan import Counts
from pipeline.run import OutputSettings, Run
from pipeline.shard import ShardSummary, read_footer
from schemas import summary as summary_schema
from schemas.masks import Status
from schemas.summary import State, Summary

_FOOTER_READERS: Final = 32
_LISTED_SHARDS: Final = 1000
_WAIT_S: Final = 1.0


def shards_to_do(run: Run[OutputSettings]) -> list[int]:
    """The shards without a file, and with `retry_failed` those whose file holds failed images."""
    done = shards_done(run.config.output, run.config.kind)
    if run.config.retry_failed:
        done = {summary.shard for summary in read_summaries(run, done) if not summary.failed}
    return [shard for shard in range(run.shards) if shard not in done]


@dataclass(frozen=True)
class ToDo:
    """The shards that a command is to make: those of now, and those that are numbered later."""

    run: Run[OutputSettings]
    counts: Counts
    """Of now."""
    shards: list[int]
    """Of now, those that are not done."""

    @property
    def shards_before(self) -> int:
        """Shards finished before."""
        return self.counts.shards - len(self.shards)

    @cached_property
    def images_before(self) -> int:
        """Images of the shards finished before."""
        return self.counts.images - sum(self.run.images_in(shard) for shard in self.shards)

    def __bool__(self) -> bool:
        """Whether there is, or may be, any."""
        return bool(self.shards) or not self.run.plan.ended or self.run.shards > self.counts.shards

    def batches(self, at_most: int) -> Iterator[list[int]]:
        """All of them, some at a time; an empty list each second in which there are none yet.

        Raises:
            IncompleteRun: not all images could be listed; what was numbered before has come.
        """
        left, numbered = self.shards, self.counts.shards
        while True:
            now = self.run.shards
            left, numbered = [*left, *range(numbered, now)], now
            if left:
                yield left[:at_most]
                left = left[at_most:]
            elif not self._is_known(numbered):
                yield []
            elif self.run.shards == numbered:
                return

    def _is_known(self, numbered: int) -> bool:
        """Wait a second for it to be known whether there are more shards than so many."""
        try:
            return self.run.plan.wait(numbered, _WAIT_S)
        except EverymaskError as error:
            raise IncompleteRun(
                f"Not all images could be listed: {error}\nThose that were are done; the same command goes on."
            ) from error


def to_do(run: Run[OutputSettings]) -> ToDo:
    """What is left to make, as the output is now."""
    counts = run.plan.counts
    return ToDo(run, counts, [shard for shard in shards_to_do(run) if shard < counts.shards])


def read_summaries(run: Run[OutputSettings], shards: Iterable[int]) -> Iterator[ShardSummary]:
    """The summaries of finished shards, from their footers; none of a damaged file.

    Raises:
        StorageError: a file cannot be read.
    """

    def read(shard: int) -> ShardSummary | None:
        try:
            return read_footer(run.config.output, run.config.kind, shard)[1]
        except (pa.ArrowException, OSError, KeyError, ValueError):
            return None

    with ThreadPoolExecutor(_FOOTER_READERS, "footers") as pool:
        for summary in pool.map(read, sorted(shards)):
            if summary is not None:
                yield summary


def write_summary(
    run: Run[OutputSettings], state: State, made: dict[int, ShardSummary], seconds: float
) -> Summary:
    """Reconcile what is in the output with the manifest, and write `summary.json`.

    Args:
        run: The run.
        state: How it ended; "complete" becomes "incomplete" where shards have no file, or a damaged one.
        made: The summaries this run's workers returned, by shard, which need not be read again.
        seconds: How long this run took.
    """
    counts, listed = run.plan.counts, run.plan.ended
    done = shards_done(run.config.output, run.config.kind) & set(range(counts.shards))
    summaries = [made[shard] for shard in done & made.keys()]
    summaries += read_summaries(run, done - made.keys())
    statuses: Counter[str] = Counter()
    for shard in summaries:
        statuses.update(shard.statuses)
    ok, empty = statuses.pop(Status.OK, 0), statuses.pop(Status.EMPTY, 0)
    missing = sorted(set(range(counts.shards)) - done)
    damaged = sorted(done - {shard.shard for shard in summaries})
    finished = sum(shard.images for shard in made.values())
    document: Summary = {
        "schema_version": summary_schema.SCHEMA_VERSION,
        "state": "incomplete" if (missing or damaged) and state == "complete" else state,
        "fingerprint": run.fingerprint,
        "images": counts.images,
        "listed": listed,
        "ok": ok,
        "empty": empty,
        "failed": statuses.total(),
        "not_done": counts.images - ok - empty - statuses.total(),
        "failures": dict(statuses.most_common()),
        "masks": sum(shard.masks for shard in summaries),
        "funnel": funnel_of(summaries),
        "bytes": sum(shard.bytes for shard in summaries),
        "shards": counts.shards,
        "missing_shards": missing[:_LISTED_SHARDS],
        "damaged_shards": damaged[:_LISTED_SHARDS],
        "skipped": counts.skipped,
        "duplicates": counts.duplicates,
        "worker_seconds": round(sum(shard.seconds for shard in summaries), 3),
        "seconds": round(seconds, 3),
        "images_per_second": round(finished / seconds, 3) if seconds else 0.0,
    }
    storage.write_atomic(f"{run.config.output}/summary.json", as_json(document))
    return document


def funnel_of(summaries: Iterable[ShardSummary]) -> dict[str, int] | None:
    """The shards' funnels as one; None where one of them was not counted."""
    total: Counter[str] = Counter()
    for shard in summaries:
        if shard.funnel is None:
            return None
        total.update(shard.funnel)
    return dict(total)
