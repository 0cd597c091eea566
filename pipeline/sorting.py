"""The rows of a listing, sorted by where the bytes lie, however many there are.

Sorted runs are kept on local disk and merged, so that memory does not grow. `ROW_SCHEMA` is the manifest's without
the number, and whether the row is `new`: those that have their number already come first among equals.
"""

import bisect
import functools
import itertools
import uuid
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute

from pipeline.sources import ImageRef
from schemas.manifest import MANIFEST_SCHEMA

pc: Final[Any] = pyarrow.compute  # whose stubs know no chunked columns

RUNS_OPEN: Final = 256
"""Runs merged at once: each is an open file and `_RUN_BATCH` to twice as many rows in memory."""

LISTED: Final = tuple(name for name in MANIFEST_SCHEMA.names if name != "image_id")
"""The columns that a listing says, in the order of `ImageRef`."""
ROW_SCHEMA: Final = pa.schema([*(MANIFEST_SCHEMA.field(name) for name in LISTED), pa.field("new", pa.bool_())])

_CONVERTED_ROWS: Final = 10_000
_RUN_BATCH: Final = 1024
_Key = tuple[str, int, str, bool, int, str]


def tables_of(images: Iterable[ImageRef], rows: int) -> Iterator[pa.Table]:
    """A listing in tables of so many rows; the last one may have fewer. None of an empty listing."""
    images = iter(images)
    while True:
        tables: list[pa.Table] = []
        left = rows
        while left and (refs := list(itertools.islice(images, min(left, _CONVERTED_ROWS)))):
            tables.append(_table(refs))
            left -= len(refs)
        if tables:
            yield pa.concat_tables(tables).combine_chunks()
        if left:
            return


def _table(refs: list[ImageRef]) -> pa.Table:
    columns = [*zip(*refs, strict=True), [True] * len(refs)]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, ROW_SCHEMA, strict=True)]
    return pa.Table.from_arrays(arrays, schema=ROW_SCHEMA)


def in_order(tables: Iterable[pa.Table], folder: Path) -> Iterator[pa.Table]:
    """All rows in order. Each table is sorted in memory; more than one of them by way of files in a folder."""
    runs: list[Path] = []
    first: pa.Table | None = None
    for table in tables:
        if first is None and not runs:
            first = _in_order(table)
            continue
        if first is not None:
            runs, first = [_write_run([first], folder)], None
        runs.append(_write_run([_in_order(table)], folder))
        if len(runs) == RUNS_OPEN:
            merged = _write_run(_merged(runs), folder)
            for run in runs:
                run.unlink()
            runs = [merged]
    return _merged(runs) if first is None else iter([first])


def in_order_as_far_as(tables: Iterable[pa.Table], folder: Path) -> Iterator[pa.Table]:
    """The tables of a listing that is in order already, at once, each sorted in itself.

    From the first table on that begins before the end of the one before, all rows are sorted before they come: the
    listing was not in order.
    """
    tables = iter(tables)
    last: _Key | None = None
    for table in tables:
        rows = _in_order(table)
        if last is not None and _key(rows, 0) < last:
            yield from in_order(itertools.chain([rows], tables), folder)
            return
        last = _key(rows, len(rows) - 1)
        yield rows


def _in_order(table: pa.Table) -> pa.Table:
    """By where the bytes lie; the rest decides between repeated URIs, so that the same one is always kept."""
    keys: dict[str, Any] = {
        "where": pc.coalesce(table["container"], table["uri"]),
        "position": pc.fill_null(table["position"], 0),
        "uri": table["uri"],
        "new": table["new"],
        "size": pc.fill_null(table["size"], -1),
        "etag": pc.fill_null(table["etag"], ""),
    }
    return table.take(pc.sort_indices(pa.table(keys), [(name, "ascending") for name in keys]))


def _key(table: pa.Table, row: int) -> _Key:
    """What `_in_order` sorts by, to compare single rows."""
    uri, size, etag, container, position, new = (column[row].as_py() for column in table.columns)
    return container or uri, position or 0, uri, new, -1 if size is None else size, etag or ""


def _write_run(tables: Iterable[pa.Table], folder: Path) -> Path:
    path = folder / f"{uuid.uuid4().hex}.arrow"
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, ROW_SCHEMA, options=options) as writer:
        for table in tables:
            writer.write_table(table, max_chunksize=_RUN_BATCH)
    return path


def _merged(paths: list[Path]) -> Iterator[pa.Table]:
    """The rows of sorted runs in order: again and again those that no row still on disk can come before."""
    with ExitStack() as files:
        runs = [_Run(files.enter_context(pa.OSFile(str(path), "rb"))) for path in paths]
        while runs := [run for run in runs if run.fill()]:
            bound = min((run.last for run in runs if not run.ended), default=None)
            yield _in_order(pa.concat_tables([run.take(bound) for run in runs]).combine_chunks())


class _Run:
    """A sorted run on disk, and its next rows, `_RUN_BATCH` to twice as many, in memory."""

    def __init__(self, file: pa.NativeFile) -> None:
        self._batches = iter(pa.ipc.open_stream(file))
        self._rows = ROW_SCHEMA.empty_table()
        self.ended = False

    def fill(self) -> bool:
        """Read on where few rows are left. Whether there are any."""
        while len(self._rows) < _RUN_BATCH and not self.ended:
            batch = next(self._batches, None)
            self.ended = batch is None
            if batch is not None:
                self._rows = pa.concat_tables([self._rows, pa.Table.from_batches([batch])])
        return len(self._rows) > 0

    @property
    def last(self) -> _Key:
        return _key(self._rows, len(self._rows) - 1)

    def take(self, bound: _Key | None) -> pa.Table:
        """Remove the rows up to and with `bound`; all if there is none."""
        count = len(self._rows)
        if bound is not None:
            count = bisect.bisect_right(range(count), bound, key=functools.partial(_key, self._rows))
        taken, self._rows = self._rows.slice(0, count), self._rows.slice(count)
        return taken
