"""How long the phases of an image take, also on a GPU, which computes on after a call has returned."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pipeline.phases import Phase


class PhaseClock:
    """Seconds of one image by phase.

    On CUDA, events in the stream mark where a phase begins and ends. They are read when the image is finished and
    its results were copied to the host, so that nothing waits for the sake of measuring. Elsewhere it is the time
    that passes in the phase's calls.
    """

    def __init__(self, device: torch.device) -> None:
        """Measure what runs on a device."""
        self._on_cuda = device.type == "cuda"
        self._spans: list[tuple[Phase, float, float]] = []
        self._marks: list[tuple[Phase, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Add the block's time to a phase; blocks must not lie in one another."""
        if self._on_cuda:
            begin = _mark()
            yield
            self._marks.append((phase, begin, _mark()))
        else:
            start = time.perf_counter()
            yield
            self._spans.append((phase, start, time.perf_counter()))

    def seconds(self) -> dict[Phase, float]:
        """Those of the phases that there were, after the last of them."""
        total: defaultdict[Phase, float] = defaultdict(float)
        for phase, start, end in self._spans:
            total[phase] += end - start
        for phase, begin, stop in self._marks:
            stop.synchronize()
            total[phase] += begin.elapsed_time(stop) / 1000
        return dict(total)


def _mark() -> torch.cuda.Event:
    event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event
