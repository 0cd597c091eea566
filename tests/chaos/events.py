"""What disturbs a run, and when: drawn from a seed."""

import itertools
import random
from dataclasses import dataclass
from enum import StrEnum

from faulty_proxy import Fault


class Kind(StrEnum):
    """What an event hits."""

    WORKER = "worker"
    NODE = "node"
    DRIVER = "driver"
    STORE = "store"


@dataclass(frozen=True)
class Event:
    """A process that is killed, or a store that fails for so many requests.

    A moment is a number of reads and no time, so that an event never comes too late, however slow the machine is.
    """

    after: int
    """It comes when this many images have been read, those that are read again included."""
    kind: Kind
    fault: Fault | None = None
    requests: int = 0


def draw_events(seed: int, count: int, images: int) -> list[Event]:
    """Events for the first three quarters of a run of so many images, in order; of four or more, every kind."""
    draw = random.Random(seed)
    kinds = [*Kind, *draw.choices(list(Kind), k=max(0, count - len(Kind)))][:count]
    draw.shuffle(kinds)
    faults = itertools.cycle(draw.sample(list(Fault), len(Fault)))
    moments = sorted(draw.sample(range(1, images * 3 // 4), count))
    return [
        Event(after, kind, next(faults), draw.randint(2, 10)) if kind is Kind.STORE else Event(after, kind)
        for after, kind in zip(moments, kinds, strict=True)
    ]
