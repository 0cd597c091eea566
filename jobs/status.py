"""How far a run is, what fails, and what looks stuck, from anywhere that its output can be read."""

import json
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Final

from cyclopts import Parameter
from cyclopts.validators import Number

from jobs.command import run_command
from pipeline import storage
from pipeline.status import Status, findings, read_status
from schemas.progress import Progress

_WIDTH: Final = 80
_SHOWN: Final = 10  # rows of a table
_LABEL: Final = 12
_CLEAR: Final = "\x1b[H\x1b[2J"  # a terminal's screen
_Row = Sequence[str]


def status(
    *,
    output: str,
    json_: Annotated[bool, Parameter(name="--json")] = False,
    watch: Annotated[float | None, Parameter(validator=Number(gte=1))] = None,
) -> int:
    """Say how far a run is, how fast, what failed, and what looks stuck.

    Only the output is read, so it works wherever that can be read, without Ray: run.json, progress.json, which the
    command that makes the run writes every ten seconds, summary.json, and the listing of the shards.

    Exit codes: 0 it was said, whatever it is; 2 there is no run, or one that this version does not read; 3 the
    address cannot be read; 130 interrupted.

    Args:
        output: What the command that makes the run was given as --output.
        json_: Print JSON, with --watch a line each time.
        watch: Say it again after this many seconds, until the run has ended.
    """
    output = storage.canonical_uri(output)
    while True:
        found = read_status(output)
        if json_:
            print(json.dumps(_as_json(found), indent=2 if watch is None else None), flush=True)
        else:
            clear = _CLEAR if watch is not None and sys.stdout.isatty() else ""
            print(clear + "\n".join([*_lines(found), ""]), flush=True)
        if watch is None or found.state != "running":
            return 0
        time.sleep(watch)


def _as_json(found: Status) -> dict[str, Any]:
    return {
        "output": found.output,
        "run_id": found.run_id,
        "kind": found.kind,
        "state": found.state,
        "shards_with_file": found.shards_done,
        "silent_seconds": found.silent_seconds,
        "findings": findings(found),
        "progress": found.progress,
        "summary": found.summary,
    }


def _lines(found: Status) -> Iterator[str]:
    """The status as text, in lines of at most 80 characters unless an address is longer."""
    yield f"{found.kind}, run {found.run_id}: {found.state or 'no word of its end'}"
    yield found.output
    yield ""
    if found.progress is not None:
        yield from _counts(found, found.progress)
        yield from _tables(found.progress)
    else:
        yield from _counts_without_progress(found)
    if said := findings(found):
        yield ""
        for finding in said:
            yield from textwrap.wrap(
                finding, _WIDTH, initial_indent="! ", subsequent_indent="  ", break_long_words=False
            )


def _counts(found: Status, progress: Progress) -> Iterator[str]:
    done = progress["images_before"] + progress["images_done"]
    running = found.state == "running"
    before = f", {progress['images_before']:,} of them before" if progress["images_before"] else ""
    so_far = "" if progress["listed"] else ", as far as they are listed"
    images = _of(done, progress["images"])
    yield _labelled("images", f"{images}{so_far}{before}; {progress['failed']:,} failed")
    if progress["failures"]:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in progress["failures"].items())
        yield from textwrap.wrap(
            reasons, _WIDTH, initial_indent=f"{'failures':{_LABEL}}", subsequent_indent=" " * _LABEL
        )
    workers = progress["workers"] if running else None
    in_work = f", {progress['shards_in_work']:,} in work" if workers is not None else ""
    failed = f", {progress['shards_failed']:,} failed" if progress["shards_failed"] else ""
    yield _labelled("shards", f"{_of(found.shards_done, found.shards)}{in_work}{failed}")
    with_masks = found.kind == "masks"
    if with_masks:
        yield _labelled("masks", f"{progress['masks']:,}")
    if running:
        yield _labelled("now", _rates(progress, "_recent", with_masks=with_masks))
    yield _labelled("on average", _rates(progress, "", with_masks=with_masks))
    if running:
        left = progress["seconds_left"]
        yield _labelled("time left", "unknown" if left is None else f"about {_duration(left)}")
    if workers is not None:
        yield _labelled("workers", f"{workers:,} at work, {progress['workers_died']:,} died")
    updated = f", updated {_duration(found.silent_seconds or 0)} ago" if running else ""
    yield _labelled("time", f"{_duration(progress['seconds'])} since {_utc(progress['started'])}{updated}")


def _counts_without_progress(found: Status) -> Iterator[str]:
    if found.summary is not None:
        summary = found.summary
        done = summary["images"] - summary["not_done"]
        yield _labelled("images", f"{_of(done, summary['images'])}; {summary['failed']:,} failed, by summary.json")
    else:
        yield _labelled("images", f"{found.document['manifest']['images']:,}; there is no summary.json")
    yield _labelled("shards", _of(found.shards_done, found.shards))


def _tables(progress: Progress) -> Iterator[str]:
    if progress["in_work"]:
        yield from _table(
            "In work",
            (">shard", ">attempt", ">images", ">for", ">image", ">at hand", "uri"),
            [
                (
                    str(one["shard"]),
                    str(one["attempt"]),
                    f"{one['images']}/{one['of']}",
                    _duration(one["seconds"]),
                    *(
                        (str(image["image_id"]), _duration(image["seconds"]), image["uri"])
                        if (image := one["image"]) is not None
                        else ("-", "-", "")
                    ),
                )
                for one in progress["in_work"][:_SHOWN]
            ],
        )
    if progress["slowest_images"]:
        yield from _table(
            "Slowest images",
            (">image", ">seconds", "status", "uri"),
            [
                (str(one["image_id"]), f"{one['seconds']:.2f}", one["status"], one["uri"])
                for one in progress["slowest_images"]
            ],
        )
    if progress["slowest_shards"]:
        yield from _table(
            "Slowest shards",
            (">shard", ">seconds", ">images"),
            [
                (str(one["shard"]), f"{one['seconds']:.1f}", str(one["images"]))
                for one in progress["slowest_shards"]
            ],
        )


def _table(title: str, header: _Row, rows: Sequence[_Row]) -> Iterator[str]:
    """A title and rows in columns. A column whose name begins with > is aligned right; the last is cut to fit."""
    names = [name.removeprefix(">") for name in header]
    widths = [max(len(row[column]) for row in [names, *rows]) for column in range(len(names))]
    last = _WIDTH - sum(widths[:-1]) - 2 * (len(widths) - 1)
    yield ""
    yield title
    for row in [names, *rows]:
        cells = [
            f"{cell:>{width}}" if name.startswith(">") else f"{cell:{width}}"
            for name, cell, width in zip(header, row, widths, strict=True)
        ]
        if not header[-1].startswith(">"):
            cells[-1] = _end_of(row[-1], last)
        yield "  ".join(cells).rstrip()


def _end_of(text: str, width: int) -> str:
    """An address says most at its end."""
    return text if len(text) <= width else "..." + text[3 - width :]


def _labelled(label: str, text: str) -> str:
    return f"{label:{_LABEL}}{text}"


def _of(done: int, total: int) -> str:
    return f"{done:,} of {total:,} ({done / max(total, 1):.1%})"


def _rates(progress: Progress, which: str, *, with_masks: bool) -> str:
    rates = dict(progress)
    masks = f", {rates[f'masks_per_second{which}']:,.1f} masks/s" if with_masks else ""
    return f"{rates[f'images_per_second{which}']:,.2f} images/s{masks}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86_400:.1f} days"


def _utc(moment: str) -> str:
    return moment[:16].replace("T", " ") + " UTC"


if __name__ == "__main__":
    run_command(status, "jobs.status")
