"""What a worker does when its machine is taken back: SIGTERM comes, and little later the end.

A shard that is not finished is made again elsewhere, whatever becomes of this process. Time to leave is for what
others would miss: a file that is being written is written to its end, and the shard is given back, so that the
attempt is not held against it.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Notice:
    """SIGTERM to this process, which ends it once its work has let go, by whatever SIGTERM did before.

    The work is in another thread than the one that hears signals, which is the main thread. To be made there.

    Args:
        seconds: How long the work may take to let go. A spot machine has 15 to 120 seconds, and others want
            some of them.
    """

    def __init__(self, seconds: float) -> None:
        self._given = threading.Event()
        self._idle = threading.Event()
        self._idle.set()
        ended_by = signal.getsignal(signal.SIGTERM)

        def on_terminate(number: int, frame: FrameType | None) -> None:
            self._given.set()
            self._idle.wait(seconds)
            if callable(ended_by):
                ended_by(number, frame)
            else:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)

        signal.signal(signal.SIGTERM, on_terminate)

    def check(self) -> None:
        """End the work's thread where notice has been given.

        Raises:
            SystemExit: which is no error, and with which a thread ends without a word.
        """
        if self._given.is_set():
            raise SystemExit

    @contextmanager
    def working(self) -> Iterator[None]:
        """The block is work that must let go before the process ends."""
        self._idle.clear()
        try:
            yield
        finally:
            self._idle.set()
