"""S3 and what speaks like it: its own requests, through the client of s3fs."""

import functools
import os
import re
from collections.abc import Iterator
from datetime import datetime
from typing import IO, Any, Final

import fsspec
from fsspec.asyn import sync

from pipeline.errors import ChangedError, StorageError
from pipeline.storage.attempts import attempt, http_status, redact
from pipeline.storage.files import FileInfo
from pipeline.storage.parallel import Listed, Request, in_order, listed

_CONNECT_TIMEOUT_S: Final = 10
_READ_TIMEOUT_S: Final = 60
_CONNECTIONS: Final = 64

_LARGE_FOLDERS: Final = 4
"""Folders in a page at most, for each of them to be worth a request."""
_FOLDER_PAGES: Final = 10
"""Pages of folders at most: the names are in memory, and who has more has small ones among them."""

_ISO_TIME: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")
_DIRECTORY_BUCKET: Final = "--x-s3"  # of S3 Express One Zone
_BUCKET: Final = re.compile(r"[a-zA-Z0-9._-]+")


@functools.cache
def client() -> Any:
    """One client for all threads: its calls run on fsspec's own loop. Only `attempt` retries."""
    fs = fsspec.filesystem(
        "s3",
        skip_instance_cache=True,
        use_listings_cache=False,
        config_kwargs={
            "retries": {"total_max_attempts": 1},
            "connect_timeout": _CONNECT_TIMEOUT_S,
            "read_timeout": _READ_TIMEOUT_S,
            "max_pool_connections": _CONNECTIONS,
        },
    )
    fs.retries = 1
    fs.connect()
    fs.session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_timestamp)
    return fs


def _timestamp(value: Any) -> Any:
    """A time as botocore understands it. Its own way is four fifths of reading a listing: one a key."""
    if isinstance(value, str) and _ISO_TIME.fullmatch(value):
        return datetime.fromisoformat(value)
    from botocore.utils import parse_timestamp  # noqa: PLC0415 (comes with s3fs, which need not be installed)

    return parse_timestamp(value)


os.register_at_fork(after_in_child=client.cache_clear)


def stat(uri: str) -> FileInfo | None:
    bucket, key = _bucket_and_key(uri)
    if not key:
        return None
    try:
        head = client().call_s3("head_object", Bucket=bucket, Key=key)
    except FileNotFoundError:
        return None
    return FileInfo(uri, head["ContentLength"], head.get("ETag"))


def read(uri: str, offset: int, size: int | None, etag: str | None) -> bytes:
    bucket, key = _bucket_and_key(uri)
    ranged: dict[str, str] = {}
    if offset or size is not None:
        ranged["Range"] = f"bytes={offset}-{'' if size is None else offset + size - 1}"
    fs = client()
    try:
        response = fs.call_s3("get_object", Bucket=bucket, Key=key, **ranged)
    except OSError as error:
        if http_status(error.__cause__ or error) == 416:  # the range begins after the end
            return b""
        raise
    found = response.get("ETag")
    if etag is not None and found is not None and found.strip('"') != etag.strip('"'):
        fs.loop.call_soon_threadsafe(response["Body"].close)
        raise ChangedError(f"{redact(uri)} has changed: it was version {etag} and is {found}")
    data: bytes = sync(fs.loop, _body, response["Body"])
    return data


def write(uri: str, data: IO[bytes]) -> None:
    bucket, key = _bucket_and_key(uri)
    client().call_s3("put_object", Bucket=bucket, Key=key, Body=data)


def delete(uri: str) -> None:
    bucket, key = _bucket_and_key(uri)
    client().call_s3("delete_object", Bucket=bucket, Key=key)


def names(uri: str) -> Iterator[str]:
    bucket, key = _bucket_and_key(uri)
    prefix = f"{key}/" if key else ""
    token: dict[str, str] = {}
    while True:
        page = _page(uri, bucket, prefix, Delimiter="/", **token)
        for item in page.get("Contents", ()):
            if name := item["Key"][len(prefix) :]:
                yield name
        for item in page.get("CommonPrefixes", ()):
            yield item["Prefix"][len(prefix) : -1]
        if not page.get("IsTruncated"):
            return
        token = {"ContinuationToken": page["NextContinuationToken"]}


def walk(uri: str, stem: str, _depth: int | None) -> Iterator[FileInfo]:
    bucket, key = _bucket_and_key(uri)
    return listed(functools.partial(_begin, uri, bucket, f"{key}/{stem}" if key else stem))


def _begin(uri: str, bucket: str, prefix: str) -> Listed:
    """The keys of a prefix, if a page holds them; else how to list them.

    Folder by folder where those of the first page are large: elsewhere that would be a request for a few keys.
    """
    page = _page(uri, bucket, prefix)
    if not page.get("IsTruncated"):
        return Listed([_files(uri, page)])
    below = (item["Key"][len(prefix) :].partition("/") for item in page["Contents"])
    if 1 <= len({name for name, slash, _ in below if slash}) <= _LARGE_FOLDERS:
        return Listed([functools.partial(_by_folder, uri, bucket, prefix)])
    return Listed([_files(uri, page), _next_page(uri, bucket, prefix, page)])


def _by_folder(uri: str, bucket: str, prefix: str) -> Listed:
    """The keys directly below a prefix, and its folders to list; all of it in one row if there are too many."""
    found: list[tuple[str, FileInfo | Request]] = []
    token: dict[str, str] = {}
    for _ in range(_FOLDER_PAGES):
        page = _page(uri, bucket, prefix, Delimiter="/", **token)
        found += [(file.uri, file) for file in _files(uri, page)]
        for item in page.get("CommonPrefixes", ()):
            folder = item["Prefix"]
            found.append((f"{_root(uri)}/{folder}", functools.partial(_begin, uri, bucket, folder)))
        if not page.get("IsTruncated"):
            return in_order(found)
        token = {"ContinuationToken": page["NextContinuationToken"]}
    return Listed([functools.partial(_in_a_row, uri, bucket, prefix)])


def _in_a_row(uri: str, bucket: str, prefix: str, **token: str) -> Listed:
    """One page of all keys of a prefix, and the next one to list."""
    page = _page(uri, bucket, prefix, **token)
    more = [_next_page(uri, bucket, prefix, page)] if page.get("IsTruncated") else []
    return Listed([_files(uri, page), *more])


def _next_page(uri: str, bucket: str, prefix: str, page: dict[str, Any]) -> Request:
    return functools.partial(_in_a_row, uri, bucket, prefix, ContinuationToken=page["NextContinuationToken"])


def _files(uri: str, page: dict[str, Any]) -> list[FileInfo]:
    root = _root(uri)
    return [FileInfo(f"{root}/{item['Key']}", item["Size"], item.get("ETag")) for item in page.get("Contents", ())]


def _root(uri: str) -> str:
    """The bucket's address."""
    return "/".join(uri.split("/", 3)[:3])


def lists_in_order(uri: str) -> bool:
    return not _bucket_and_key(uri)[0].endswith(_DIRECTORY_BUCKET)


def folder_exists(uri: str) -> bool:
    return _bucket_and_key(uri)[1] == ""


def _bucket_and_key(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.partition("://")[2].partition("/")
    if not _BUCKET.fullmatch(bucket):  # as in `key:secret@bucket`, which botocore's message would repeat
        raise StorageError(f"{redact(uri)} does not begin with a bucket's name; credentials belong elsewhere")
    return bucket, key


async def _body(body: Any) -> bytes:
    try:
        data: bytes = await body.read()
        return data
    finally:
        body.close()


def _page(uri: str, bucket: str, prefix: str, **request: str) -> dict[str, Any]:
    """At most 1,000 of the keys that begin with a prefix; with `Delimiter="/"` its folders in place of theirs."""
    request |= {"Bucket": bucket, "Prefix": prefix}
    page: dict[str, Any] = attempt("list", uri, lambda: client().call_s3("list_objects_v2", **request))
    return page
