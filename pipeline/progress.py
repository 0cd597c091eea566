"""How far a run is: a bar on a terminal, a line every few seconds elsewhere."""

import logging
import sys
import time
from typing import Any, Final

from tqdm import tqdm

_SECONDS_BETWEEN_LINES: Final = 10.0
_log = logging.getLogger("everymask")


class Progress:
    """Shows images per second, masks per second, failures and the time left."""

    def __init__(self, images: int, done_before: int, *, with_masks: bool) -> None:
        """Begin to count.

        Args:
            images: Of the whole run.
            done_before: Of them, in shards that were finished before.
            with_masks: Whether the run makes masks.
        """
        self._start = time.monotonic()
        self._images = images
        self._done_before = done_before
        self._with_masks = with_masks
        self._last_line = self._start
        self._bar: tqdm[Any] | None = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=images, initial=done_before, unit="image", dynamic_ncols=True)

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._start

    def show(self, images: int, masks: int, failed: int) -> None:
        """Update with what this run has done so far."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self._masks(masks)}{failed} failed", refresh=False)
            self._bar.update(self._done_before + images - self._bar.n)
        elif time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            _log.info("%s", self._line(images, masks, failed))

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()

    def _line(self, images: int, masks: int, failed: int) -> str:
        rate = images / self.seconds
        done = self._done_before + images
        left = f"{(self._images - done) / rate / 60:.1f} min left" if images else "time left unknown"
        return (
            f"{done}/{self._images} images ({done / max(self._images, 1):.1%}), {rate:.2f} images/s, "
            f"{self._masks(masks)}{failed} failed, {left}"
        )

    def _masks(self, masks: int) -> str:
        return f"{masks / max(self.seconds, 1e-9):.1f} masks/s, " if self._with_masks else ""
