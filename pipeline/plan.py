"""What a run's manifest has, which grows where shards are made while the images are still listed."""

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final, TypeVar

_T = TypeVar("_T")
_STOP_SECONDS: Final = 5.0  # for a listing to notice that nobody wants it any more


@dataclass(frozen=True)
class Counts:
    """What the manifest has, and what the listing has left out."""

    images: int = 0
    shards: int = 0
    duplicates: int = 0
    skipped: dict[str, int] = field(default_factory=dict)


class Stopped(Exception):
    """The listing was given up."""


class Plan:
    """The counts so far. One thread lists and tells; others ask and wait."""

    def __init__(self, counts: Counts, *, ended: bool = True) -> None:
        """Begin with counts, which are the last ones where the listing has `ended`."""
        self._counts, self._ended = counts, ended
        self._error: BaseException | None = None
        self._stopped = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    @property
    def counts(self) -> Counts:
        """Those that are final, in the order of the shards: later there may be more, never others."""
        return self._counts

    @property
    def ended(self) -> bool:
        """Whether all images are listed and numbered."""
        return self._ended

    def wait(self, shards: int, seconds: float) -> bool:
        """Wait until there are more shards than so many, or the listing has ended; whether it is so in time.

        Raises what has ended the listing early.
        """

        def is_so() -> bool:
            return self._counts.shards > shards or self._ended or self._error is not None

        with self._changed:
            in_time = self._changed.wait_for(is_so, seconds)
            if self._error is not None and self._counts.shards <= shards:
                raise self._error
        return in_time

    def grow(self, counts: Counts, *, ended: bool = False) -> None:
        """There is more, or the last of it."""
        with self._changed:
            self._counts, self._ended = counts, ended
            self._changed.notify_all()

    def begin(self, list_all: "Callable[[Plan], None]") -> None:
        """List in a thread of its own, by a function that tells by `grow`."""

        def run() -> None:
            try:
                list_all(self)
            except Stopped:
                return
            except BaseException as error:  # noqa: BLE001 (raised by whoever waits)
                with self._changed:
                    self._error = error
                    self._changed.notify_all()

        self._thread = threading.Thread(target=run, name="listing", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Give the listing up, if it has not ended."""
        self._stopped = True
        if self._thread is not None:
            self._thread.join(_STOP_SECONDS)

    def until_stopped(self, items: Iterable[_T]) -> Iterator[_T]:
        """The same items, as long as they are wanted.

        Raises:
            Stopped: they are not any more.
        """
        for item in items:
            if self._stopped:
                raise Stopped
            yield item
