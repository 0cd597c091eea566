"""How far a run is: a bar on a terminal, a line every few seconds elsewhere."""

import logging
import sys
import time
from typing import Any, Final

from tqdm import tqdm

from pipeline.plan import Plan

_SECONDS_BETWEEN_LINES: Final = 10.0
_log = logging.getLogger("everymask")


class Progress:
    """Shows images per second, masks per second, failures and the time left."""

    def __init__(self, plan: Plan, done_before: int, *, with_masks: bool) -> None:
        """Begin to count.

        Args:
            plan: Of the whole run.
            done_before: Of its images, in shards that were finished before.
            with_masks: Whether the run makes masks.
        """
        self._start = time.monotonic()
        self._plan = plan
        self._done_before = done_before
        self._with_masks = with_masks
        self._last_line = self._start
        self._bar: tqdm[Any] | None = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=plan.counts.images, initial=done_before, unit="image", dynamic_ncols=True)

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._start

    def show(self, images: int, masks: int, failed: int) -> None:
        """Update with what this run has done so far."""
        if self._bar is not None:
            self._bar.total = self._plan.counts.images
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
        listed, total = self._plan.ended, self._plan.counts.images
        left = f"{(total - done) / rate / 60:.1f} min left" if images and listed else "time left unknown"
        share = f"{done / max(total, 1):.1%}" if listed else "listing goes on"
        return f"{done}/{total} images ({share}), {rate:.2f} images/s, {self._masks(masks)}{failed} failed, {left}"

    def _masks(self, masks: int) -> str:
        return f"{masks / max(self.seconds, 1e-9):.1f} masks/s, " if self._with_masks else ""
