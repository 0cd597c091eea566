"""S3 and what speaks like it: its own requests, through the client of s3fs."""

import functools
import os
import re
from collections.abc import Iterator
from typing import IO, Any, Final

import fsspec
from fsspec.asyn import sync

from pipeline.errors import ChangedError, StorageError
from pipeline.storage.attempts import attempt, http_status, redact
from pipeline.storage.files import FileInfo

_CONNECT_TIMEOUT_S: Final = 10
_READ_TIMEOUT_S: Final = 60
_CONNECTIONS: Final = 64

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
    return fs


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
    for page in _pages(uri, Delimiter="/"):
        start = len(page.get("Prefix", ""))
        for item in page.get("Contents", ()):
            if name := item["Key"][start:]:
                yield name
        for item in page.get("CommonPrefixes", ()):
            yield item["Prefix"][start:-1]


def walk(uri: str, stem: str, _depth: int | None) -> Iterator[FileInfo]:
    root = "/".join(uri.split("/", 3)[:3])
    for page in _pages(uri, stem):
        for item in page.get("Contents", ()):
            yield FileInfo(f"{root}/{item['Key']}", item["Size"], item.get("ETag"))


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


def _pages(uri: str, stem: str = "", **request: str) -> Iterator[dict[str, Any]]:
    """The listing below a folder, a page of at most 1,000 keys at a time, in the order of the keys."""
    bucket, key = _bucket_and_key(uri)
    request |= {"Bucket": bucket, "Prefix": f"{key}/{stem}" if key else stem}
    while True:
        page = attempt("list", uri, lambda: client().call_s3("list_objects_v2", **request))
        yield page
        if not page.get("IsTruncated"):
            return
        request["ContinuationToken"] = page["NextContinuationToken"]
