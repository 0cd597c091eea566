"""A run from what is to do to its summary: what the commands that make datasets share."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Final, TypeVar

from pipeline import reconcile
from pipeline.errors import IncompleteRun, StorageError, TooManyFailures
from pipeline.progress_file import ProgressFile
from pipeline.reconcile import ToDo
from pipeline.run import OutputSettings, Run
from pipeline.shard import ShardSummary
from pipeline.storage import redact
from schemas.summary import State, Summary

_NAMED: Final = 10  # damaged shards in a message
_log = logging.getLogger("everymask")
_Settings = TypeVar("_Settings", bound=OutputSettings)
_MakeShards = Callable[[Run[_Settings], ToDo, ProgressFile], Iterator[ShardSummary]]


def finish(
    run: Run[_Settings],
    make_shards: _MakeShards[_Settings],
    within: Callable[[], AbstractContextManager[None]],
) -> None:
    """Make the shards that are missing, and reconcile.

    Args:
        run: The run.
        make_shards: Makes what is to do, tells what is in work, and yields the summaries of those it
            made.
        within: In what they are made, such as `pipeline.engine.connected`.

    Raises:
        IncompleteRun: shards are still missing.
        TooManyFailures: as `max_failure_rate` says.
    """
    to_do = reconcile.to_do(run)
    _log.info(
        "run %s: %d images in %d shards%s, %d to do; writing to %s",
        run.run_id,
        run.images,
        run.shards,
        "" if run.plan.ended else " so far, while listing goes on",
        len(to_do.shards),
        redact(run.config.output),
    )
    try:
        with ProgressFile(run, to_do) as told:
            summary = _make_and_reconcile(run, to_do, make_shards, within, told)
    finally:
        run.plan.stop()
    if summary["state"] != "complete":
        raise IncompleteRun(" ".join(_what_is_left(run, summary)))


def _what_is_left(run: Run[OutputSettings], summary: Summary) -> Iterator[str]:
    yield f"{summary['not_done']} of {run.images} images are not done."
    if summary["missing_shards"]:
        yield "Shards have no file: the log says why they failed; the same command makes them."
    if damaged := summary["damaged_shards"]:
        names = ", ".join(map(str, damaged[:_NAMED])) + (", ..." if damaged[_NAMED:] else "")
        output = redact(run.config.output)
        yield (
            f"The files of these shards are damaged: {names}. `python -m jobs.verify_masks --output {output} "
            "--remove-damaged` deletes them, and then the same command makes them."
        )


def _make_and_reconcile(
    run: Run[_Settings],
    to_do: ToDo,
    make_shards: _MakeShards[_Settings],
    within: Callable[[], AbstractContextManager[None]],
    told: ProgressFile,
) -> Summary:
    """Make the shards; however that ends, write what is there to summary.json and to progress.json."""
    made: dict[int, ShardSummary] = {}
    start = time.monotonic()
    try:
        if to_do:
            with within():
                _make(run, make_shards(run, to_do, told), made, told)
    except BaseException as error:
        if summary := _summary_after(error, run, made, time.monotonic() - start, told):
            _log.info("%s", _in_words(run, summary))
        raise
    summary = reconcile.write_summary(run, "complete", made, time.monotonic() - start)
    told.end(summary["state"])
    _log.info("%s", _in_words(run, summary))
    return summary


def _make(
    run: Run[OutputSettings],
    shards: Iterator[ShardSummary],
    made: dict[int, ShardSummary],
    told: ProgressFile,
) -> None:
    start = time.monotonic()
    try:
        for shard in shards:
            made[shard.shard] = shard
            told.finished(shard)
    except KeyboardInterrupt as error:
        # Whoever stops us may not wait for the workers to end: Ray kills a stopped job after three seconds.
        _summary_after(error, run, made, time.monotonic() - start, told)
        raise


def _summary_after(
    error: BaseException,
    run: Run[OutputSettings],
    made: dict[int, ShardSummary],
    seconds: float,
    told: ProgressFile,
) -> Summary | None:
    """Write summary.json and progress.json where a run ends by an error, which what fails now must not hide."""
    states: dict[type[BaseException], State] = {
        TooManyFailures: "too_many_failures",
        KeyboardInterrupt: "interrupted",
    }
    state = states.get(type(error), "incomplete")
    summary = None
    try:
        summary = reconcile.write_summary(run, state, made, seconds)
    except StorageError as failure:
        _log.error("summary.json is not written: %s", failure)
    told.end(state)
    return summary


def _in_words(run: Run[OutputSettings], summary: Summary) -> str:
    reasons = ", ".join(f"{count} {status}" for status, count in summary["failures"].items())
    masks = f"{summary['masks']} masks, " if run.config.kind == "masks" else ""
    more = "" if summary["listed"] else ", and those that are not listed"
    return (
        f"{summary['state']}: {summary['images']} images = {summary['ok']} ok + {summary['empty']} empty + "
        f"{summary['failed']} failed{f' ({reasons})' if reasons else ''} + {summary['not_done']} not done{more}; "
        f"{masks}{summary['images_per_second']} images/s"
    )
