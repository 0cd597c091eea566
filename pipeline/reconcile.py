"""What is in a run's output against what belongs there: what is left to do, and `summary.json` at the end."""

from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import pyarrow as pa

from pipeline import storage
from pipeline.run import OutputSettings, Run, as_json, shards_done
from pipeline.shard import ShardSummary, read_footer
from schemas import summary as summary_schema
from schemas.masks import Status
from schemas.summary import State, Summary

_FOOTER_READERS: Final = 32
_LISTED_SHARDS: Final = 1000


def shards_to_do(run: Run[OutputSettings]) -> list[int]:
    """The shards without a file, and with `retry_failed` those whose file holds failed images."""
    done = shards_done(run.config.output, run.config.kind)
    if run.config.retry_failed:
        done = {summary.shard for summary in read_summaries(run, done) if not summary.failed}
    return [shard for shard in range(run.shards) if shard not in done]


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
    done = shards_done(run.config.output, run.config.kind) & set(range(run.shards))
    summaries = [made[shard] for shard in done & made.keys()]
    summaries += read_summaries(run, done - made.keys())
    statuses: Counter[str] = Counter()
    for shard in summaries:
        statuses.update(shard.statuses)
    ok, empty = statuses.pop(Status.OK, 0), statuses.pop(Status.EMPTY, 0)
    missing = sorted(set(range(run.shards)) - done)
    damaged = sorted(done - {shard.shard for shard in summaries})
    finished = sum(shard.images for shard in made.values())
    document: Summary = {
        "schema_version": summary_schema.SCHEMA_VERSION,
        "state": "incomplete" if (missing or damaged) and state == "complete" else state,
        "fingerprint": run.fingerprint,
        "images": run.images,
        "ok": ok,
        "empty": empty,
        "failed": statuses.total(),
        "not_done": run.images - ok - empty - statuses.total(),
        "failures": dict(statuses.most_common()),
        "masks": sum(shard.masks for shard in summaries),
        "funnel": funnel_of(summaries),
        "bytes": sum(shard.bytes for shard in summaries),
        "shards": run.shards,
        "missing_shards": missing[:_LISTED_SHARDS],
        "damaged_shards": damaged[:_LISTED_SHARDS],
        "skipped": run.skipped,
        "duplicates": run.duplicates,
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
