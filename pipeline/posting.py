"""What a worker posts to the board of the shard it makes."""

import heapq
import threading
import time
from collections import Counter

from pipeline.board import SLOWEST, Post
from pipeline.phases import ON_DEVICE
from pipeline.shard import ImageDone
from pipeline.storage import redact
from schemas.progress import ImageInWork, SlowImage


class ShardPosts:
    """Counts a shard's images as they are begun and done; another thread may ask for a post at any time."""

    def __init__(self, worker: str, shard: int) -> None:
        self._worker, self._shard = worker, shard
        self._lock = threading.Lock()
        self._images = self._masks = 0
        self._failures: Counter[str] = Counter()
        self._at_hand: tuple[int, str] | None = None
        self._since = time.monotonic()
        self._slowest_seconds: list[float] = []  # a heap, whose least an image must exceed to be posted
        self._slow: list[SlowImage] = []

    def begin(self, image_id: int, uri: str) -> None:
        """An image is at hand."""
        with self._lock:
            self._at_hand, self._since = (image_id, uri), time.monotonic()

    def done(self, image: ImageDone) -> None:
        """It is done."""
        with self._lock:
            # One that was encoded with others had its part of that before it was at hand.
            on_device = sum(image.seconds.get(phase, 0.0) for phase in ON_DEVICE)
            seconds = max(time.monotonic() - self._since, on_device)
            self._images += 1
            self._masks += image.masks
            if image.failed:
                self._failures[str(image.status)] += 1
            self._at_hand = None
            self._remember(image, seconds)

    def post(self) -> Post:
        """What is to be said now."""
        with self._lock:
            slow, self._slow = self._slow, []
            image: ImageInWork | None = None
            if self._at_hand is not None:
                image_id, uri = self._at_hand
                image = {"image_id": image_id, "uri": redact(uri), "seconds": time.monotonic() - self._since}
            return Post(self._worker, self._shard, self._images, self._masks, dict(self._failures), image, slow)

    def _remember(self, image: ImageDone, seconds: float) -> None:
        if len(self._slowest_seconds) < SLOWEST:
            heapq.heappush(self._slowest_seconds, seconds)
        elif seconds <= heapq.heappushpop(self._slowest_seconds, seconds):
            return
        slow: SlowImage = {
            "image_id": image.image_id,
            "uri": redact(image.uri),
            "seconds": round(seconds, 3),
            "status": str(image.status),
        }
        self._slow = heapq.nlargest(SLOWEST, [*self._slow, slow], key=lambda one: one["seconds"])
