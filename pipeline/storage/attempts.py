"""Attempts: what is tried again and for how long, and what an error says, without credentials, in the end."""

import errno
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final, TypeVar

import tenacity

from pipeline.errors import StorageError

ATTEMPTS: Final = 8
"""How often a transient failure is tried in all."""
ATTEMPTS_TOTAL_S: Final = 60.0
"""Seconds after the first attempt in which another may begin."""
FIRST_WAIT_S: Final = 0.25
"""The wait before the second attempt; it doubles up to `LONGEST_WAIT_S`, and up to `JITTER_S` is added."""
LONGEST_WAIT_S: Final = 10.0
JITTER_S: Final = 0.5

_TRANSIENT_STATUS: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
_TRANSIENT_ERRNO: Final = frozenset({errno.EBUSY, errno.EAGAIN, errno.EREMOTEIO, errno.ETIMEDOUT})
_THROTTLED: Final = re.compile("SlowDown|Throttl|RequestLimitExceeded|RequestTimeout|InternalError")
# By name, since botocore, aiohttp, gcsfs and adlfs need not be installed.
_TRANSIENT_NAMES: Final = frozenset(
    {
        "ConnectionError",
        "TimeoutError",
        "HTTPClientError",
        "ClientConnectionError",
        "ClientPayloadError",
        "IncompleteRead",
        "IncompleteReadError",
        "ResponseParserError",
        "ResponseStreamingError",
        "ServiceRequestError",
        "ServiceResponseError",
    }
)

_USERINFO: Final = re.compile(r"://(?:[^/@:\s]*:(?!\d+/)[^@\s]*@|(?<=https://)[^/@\s]*@|(?<=http://)[^/@\s]*@)")
_SECRET_PARAMETER: Final = re.compile(
    r"([?&;][^=&\s]*(?:sig|token|credential|secret|password|key|auth)[^=&\s]*=)[^&\s'\"]+", re.IGNORECASE
)

_at_most_s: ContextVar[float] = ContextVar("at_most_s", default=float("inf"))

T = TypeVar("T")


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Within the block, in this thread, no attempt begins later than this after the first."""
    before = _at_most_s.set(seconds)
    try:
        yield
    finally:
        _at_most_s.reset(before)


def attempt(verb: str, uri: str, call: Callable[[], T]) -> T:
    """The result of `call`, tried again while it fails in a way that may pass.

    Raises:
        StorageError: `call` raised it, or anything else: then "cannot `verb` `uri`", the cause, and advice.
    """
    attempts = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_is_transient),
        wait=tenacity.wait_exponential(FIRST_WAIT_S, max=LONGEST_WAIT_S) + tenacity.wait_random(0, JITTER_S),
        stop=tenacity.stop_after_attempt(ATTEMPTS)
        | tenacity.stop_before_delay(min(ATTEMPTS_TOTAL_S, _at_most_s.get())),
        reraise=True,
    )
    try:
        return attempts(call)
    except StorageError:
        raise
    except Exception as error:
        times = f" after {attempts.statistics['attempt_number']} attempts" if _is_transient(error) else ""
        cause = redact(f"{type(error).__name__}: {error}")
        failure = StorageError(f"cannot {verb} {redact(uri)}{times}: {cause}{advice(error)}")
        if redact(str(error)) != str(error):
            raise failure from None  # a traceback would print the cause, and with it the credentials
        raise failure from error


def redact(text: str) -> str:
    """The URI or message without passwords, keys and signatures."""
    return _SECRET_PARAMETER.sub(r"\1***", _USERINFO.sub("://***@", text))


def advice(error: BaseException) -> str:
    """What the user can do about it, to stand after the message; empty if that is unknown."""
    if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
        return "; check the credentials, and that they may list, read or write this address"
    if isinstance(error, FileNotFoundError):
        return "; check the address"
    if isinstance(error, ImportError):
        return "; install the fsspec package for this kind of address, for example everymask[s3]"
    if isinstance(error, ConnectionError) or "ConnectionError" in {c.__name__ for c in type(error).__mro__}:
        return "; check the endpoint and the network"
    return ""


def http_status(error: BaseException) -> int | None:
    """The response's status, wherever botocore, aiohttp, gcsfs or adlfs keeps it."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return status if isinstance(status, int) else None
    numbers = (getattr(error, name, None) for name in ("status", "status_code", "code"))
    return next((number for number in numbers if isinstance(number, int)), None)


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, StorageError | FileNotFoundError | PermissionError):
        return False
    names = {cls.__name__ for cls in type(error).__mro__}
    if names & _TRANSIENT_NAMES or getattr(error, "errno", None) in _TRANSIENT_ERRNO:
        return True
    cause = error.__cause__ or error  # s3fs raises an OSError from botocore's error, which has the response
    return http_status(cause) in _TRANSIENT_STATUS or _THROTTLED.search(str(cause)) is not None
