"""What a reader leaves out: damaged rows, and images that are gone or not the ones that they were."""

import logging
import threading
from dataclasses import dataclass
from typing import Final

from pipeline.errors import ImageError

_NAMED_IDS: Final = 10
_NAMED: Final = 20  # pictures that the log names
_log = logging.getLogger("everymask")


@dataclass(frozen=True)
class Damage:
    """Images of a shard that were skipped."""

    shard: int
    image_ids: tuple[int, ...]
    reason: str

    def __str__(self) -> str:
        ids = ", ".join(map(str, self.image_ids[:_NAMED_IDS])) + (
            ", ..." if len(self.image_ids) > _NAMED_IDS else ""
        )
        return f"{len(self.image_ids)} images of shard {self.shard} skipped ({ids}): {self.reason}"


class Skipped:
    """What was left out: counted, and named in the log once. Safe from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._damaged: set[int] = set()
        self._failed: set[int] = set()

    def __reduce__(self) -> tuple[type["Skipped"], tuple[()]]:
        """Another process counts for itself."""
        return Skipped, ()

    @property
    def images(self) -> int:
        """How many there are."""
        return len(self._damaged | self._failed)

    def damage(self, damage: Damage) -> None:
        """Rows of a store that are damaged."""
        with self._lock:
            known = self._damaged.issuperset(damage.image_ids)
            self._damaged.update(damage.image_ids)
        if not known:
            _log.warning("%s", damage)

    def failure(self, image_id: int, error: ImageError) -> None:
        """A picture that cannot be read any more."""
        with self._lock:
            known = image_id in self._failed
            self._failed.add(image_id)
            count = len(self._failed)
        if not known and count <= _NAMED:
            rest = "; further ones are counted and not named" if count == _NAMED else ""
            _log.warning("image %d skipped, %s: %s%s", image_id, error.status, error, rest)
