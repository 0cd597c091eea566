"""The proxy that spoils a store's answers: each fault as S3's client meets it, which tries once here."""

import io
import re
import time
from collections.abc import Callable

import pytest
from aiohttp import ClientError
from botocore.exceptions import BotoCoreError
from faulty_proxy import DELAY_S, Fault, FaultyProxy

from pipeline.storage import s3

DATA = bytes(range(256)) * 2000


def read(uri: str) -> bytes:
    return s3.read(uri, 0, None, None)


def write(uri: str, data: bytes) -> None:
    s3.write(uri, io.BytesIO(data))


def test_what_is_not_spoilt_passes_unchanged(proxy: FaultyProxy, bucket: str) -> None:
    write(f"{bucket}/key", DATA)
    assert read(f"{bucket}/key") == DATA
    assert s3.read(f"{bucket}/key", 5, 900, None) == DATA[5:905]
    path = f"/{bucket.removeprefix('s3://')}/key"
    assert [(one.request, one.fault) for one in proxy.exchanges] == [
        (f"PUT {path}", None),
        (f"GET {path}", None),
        (f"GET {path}", None),
    ]


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Fault.RESET, "closed|Could not connect"),
        (Fault.TRUNCATE, "payload is not completed|closed"),
        (Fault.SLOW_DOWN, "Reduce your request rate"),
        (Fault.FORBIDDEN, "PermissionError.*Access Denied"),
    ],
)
def test_so_many_requests_meet_a_fault_and_no_more(
    proxy: FaultyProxy, bucket: str, fault: Fault, error: str
) -> None:
    write(f"{bucket}/key", DATA)
    for call in (lambda: read(f"{bucket}/key"), lambda: write(f"{bucket}/key", DATA)):
        proxy.exchanges.clear()
        proxy.spoil(fault, 4)
        errors = errors_until_done(call)
        # What ends without a word of an answer, aiohttp repeats once by itself.
        assert 2 <= len(errors) <= 4
        assert all(re.search(error, text) for text in errors), errors
        assert [one.fault for one in proxy.exchanges] == [fault] * 4 + [None]
    assert read(f"{bucket}/key") == DATA


def errors_until_done(call: Callable[[], object]) -> list[str]:
    errors = []
    while True:
        try:
            call()
        except (OSError, BotoCoreError, ClientError) as error:
            errors.append(repr(error))
        else:
            return errors


def test_a_delay(proxy: FaultyProxy, bucket: str) -> None:
    write(f"{bucket}/key", DATA)
    proxy.spoil(Fault.DELAY, 1)
    begin = time.monotonic()
    assert read(f"{bucket}/key") == DATA
    assert time.monotonic() - begin >= DELAY_S
