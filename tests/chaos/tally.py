"""What a disturbed run was and what it cost, as the store saw it."""

import itertools
from collections import Counter
from dataclasses import dataclass
from typing import Final

from chaos.events import Kind

HEADER: Final = """\
| seed | events | worker | node | driver | store | resumes | images | read again | limit | seconds | lost |
|---|---|---|---|---|---|---|---|---|---|---|---|"""


@dataclass(frozen=True)
class Tally:
    """The events, what became of the driver, and the moments at which images were read.

    Every image that is computed was read before, and a worker that dies has read ahead. So at most those that
    were read again were computed again.
    """

    seed: int
    kinds: Counter[Kind]
    resumes: int
    images: int
    images_per_shard: int
    seconds: float
    reads: list[float]

    @property
    def read_again(self) -> int:
        return len(self.reads) - self.images

    @property
    def limit(self) -> int:
        """One shard an event."""
        return self.images_per_shard * self.kinds.total()

    @property
    def lost_s(self) -> float:
        """Seconds in pauses of more than two between one image and the next, which else come several a second."""
        pauses = (later - earlier for earlier, later in itertools.pairwise(self.reads))
        return sum(pause for pause in pauses if pause > 2)

    def row(self) -> str:
        """A line of the table under `HEADER`."""
        kinds = [self.kinds[kind] for kind in Kind]
        cells = [self.seed, self.kinds.total(), *kinds, self.resumes, self.images, self.read_again, self.limit]
        return "| " + " | ".join(map(str, [*cells, round(self.seconds), round(self.lost_s)])) + " |"
