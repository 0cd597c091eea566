"""Lists of URIs: text files, CSV, and a column of a Parquet file."""

import csv
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import SettingsError
from pipeline.sources.containers import DAMAGE, parquet_layout
from pipeline.sources.refs import suffix_of
from pipeline.storage import FileInfo

_URI_COLUMNS: Final = ("uri", "url", "image")


def is_list(file: FileInfo) -> bool:
    """Whether the file is a list: a Parquet file is one if it has no images."""
    if suffix_of(file.uri) != ".parquet":
        return suffix_of(file.uri) in _READERS
    try:
        return parquet_layout(file.uri, file.etag).column is None
    except DAMAGE:
        return False  # and so it is opened for its images, which makes the damage a row


def entries(uri: str) -> Iterator[str]:
    """What the list names, as canonical URIs; "" for an entry that is empty.

    Raises:
        SettingsError: it is not UTF-8, damaged, or has no column of URIs.
        StorageError: it cannot be read.
    """
    try:
        for entry in _READERS[suffix_of(uri)](uri):
            yield _resolve(entry, uri) if entry.strip() else ""
    except (csv.Error, *DAMAGE) as error:
        raise SettingsError(f"the list {storage.redact(uri)} is damaged: {error}") from error


def _resolve(entry: str, list_uri: str) -> str:
    """An entry of a list as a canonical URI; relative ones lie beside the list."""
    if "://" in entry or entry.startswith("/"):
        return storage.canonical_uri(entry)
    folder = list_uri.partition("?")[0] if list_uri.startswith("http") else list_uri
    folder = folder.rpartition("/")[0]
    while entry.startswith(("./", "../")):
        up, _, entry = entry.partition("/")
        folder = folder.rpartition("/")[0] if up == ".." else folder
    return storage.canonical_uri(f"{folder}/{entry}")


def _lines(uri: str) -> Iterator[str]:
    with _text(uri) as text:
        yield from (line for line in (line.rstrip("\n") for line in text) if line.strip())


def _csv_column(uri: str) -> Iterator[str]:
    with _text(uri) as text:
        rows = csv.reader(text)
        names = next(rows, [])
        column = _uri_column([name.strip().lower() for name in names], uri)
        for row in rows:
            if row:  # the csv module's blank line
                yield row[column] if column < len(row) else ""


def _parquet_column(uri: str) -> Iterator[str]:
    with storage.open_input(uri) as file:
        parquet = pq.ParquetFile(file)
        names = [field.name for field in parquet.schema_arrow if _is_text(field.type)]
        name = names[_uri_column([name.lower() for name in names], uri)]
        for batch in parquet.iter_batches(columns=[name]):
            for entry in batch.column(0).to_pylist():
                yield entry or ""


_READERS: Final = {".txt": _lines, ".csv": _csv_column, ".parquet": _parquet_column}


@contextmanager
def _text(uri: str) -> Iterator[io.TextIOWrapper]:
    try:
        with io.TextIOWrapper(storage.open_input(uri), "utf-8-sig") as text:
            yield text
    except UnicodeDecodeError as error:
        raise SettingsError(f"the list {storage.redact(uri)} is not UTF-8: {error}") from error


def _uri_column(names: list[str], uri: str) -> int:
    for name in _URI_COLUMNS:
        if name in names:
            return names.index(name)
    if len(names) == 1:
        return 0
    raise SettingsError(
        f"{storage.redact(uri)} has neither images nor a column of URIs: name one of its columns"
        f" {' or '.join(_URI_COLUMNS)} (its columns of text: {', '.join(names) or 'none'})"
    )


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)
