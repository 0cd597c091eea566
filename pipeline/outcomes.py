"""From images in a manifest to their rows: fetched and decoded ahead, begun in batches.

The only place where an image's error becomes a row.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline import sources, storage
from pipeline.config import RunConfig
from pipeline.contents import SECONDS, Content, Row
from pipeline.errors import ImageError
from pipeline.manifest import ManifestRow
from pipeline.memory import is_out_of_memory
from pipeline.phases import Phase
from schemas.masks import Status

READING: Final = "reading"
"""The key of an image's `Reading`, which is told and no column."""
_DECODED_AHEAD: Final = 2
_PIXELS_PER_BATCH: Final = 2**26  # no further image is begun together with so many

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
OnBegin = Callable[[int, str], None]
"""Told when an image's bytes or pixels are waited for, and again when its turn comes if several are begun
together: its `image_id` and URI."""
Decode = Callable[[bytes], NDArray[np.uint8]]
"""From an image file's bytes to RGB, H x W x 3; raises `ImageError`. Called by several threads at once."""


@dataclass(frozen=True)
class Reading:
    """How reading stood when an image was done."""

    bytes: int
    """Of the image's file; 0 where it could not be fetched."""
    in_flight: int
    """Images of the shard that were begun, of which there was no row yet."""
    fetched: int
    """Of these, those that were fetched and not yet decoded."""
    decoded: int
    """Of these, those that were decoded."""


@dataclass
class _Image:
    """An image on its way to its row."""

    row: ManifestRow
    begun: bool = False
    bytes: int = 0
    seconds: dict[Phase, float] = field(default_factory=dict)
    """Of the phases that are over."""


_Decoded = tuple[_Image, Future[NDArray[np.uint8]]]


def outcomes(
    rows: list[ManifestRow], config: RunConfig, content: Content, decode: Decode, on_begin: OnBegin
) -> Iterator[Row]:
    """Each image's row, in order. Reading and decoding run ahead in threads of their own."""
    reading = config.reading

    def fetch(image: _Image) -> bytes:
        image.begun = True
        with _timed(image, "fetch"):
            data = sources.fetch(image.row.ref, max_bytes=reading.max_bytes)
        image.bytes = len(data)
        return data

    def decode_fetched(image_and_data: tuple[_Image, Future[bytes]]) -> NDArray[np.uint8]:
        image, fetched = image_and_data
        data = fetched.result()
        with _timed(image, "decode"):
            return decode(data)

    images = [_Image(row) for row in rows]
    decoded_ahead = max(_DECODED_AHEAD, content.images_per_batch)
    with (
        ThreadPoolExecutor(reading.read_ahead, "fetch") as fetchers,
        ThreadPoolExecutor(decoded_ahead, "decode") as decoders,
    ):
        fetched = ahead(fetchers, fetch, images, reading.read_ahead)
        pairs = zip(images, fetched, strict=True)
        decoded = zip(images, ahead(decoders, decode_fetched, pairs, decoded_ahead), strict=True)
        number = 0
        while batch := _batch(decoded, content.images_per_batch, on_begin):
            for image, outcome in _outcomes_of(batch, content, on_begin):
                number += 1
                outcome[SECONDS] = image.seconds | outcome.get(SECONDS, {})
                # Nothing further ahead can have been begun.
                behind = images[number : number + len(batch) + reading.read_ahead + decoded_ahead]
                outcome[READING] = _reading(image, behind)
                yield outcome


def _batch(decoded: Iterator[_Decoded], images: int, on_begin: OnBegin) -> list[_Decoded]:
    """The next images to be begun together, decoded or failed; empty after the last."""
    batch: list[_Decoded] = []
    pixels = 0
    while len(batch) < images and pixels < _PIXELS_PER_BATCH and (taken := next(decoded, None)):
        image, rgb_HW3 = taken
        on_begin(image.row.image_id, image.row.ref.uri)
        if rgb_HW3.exception() is None:
            pixels += rgb_HW3.result()[..., 0].size
        batch.append(taken)
    return batch


def _outcomes_of(batch: list[_Decoded], content: Content, on_begin: OnBegin) -> Iterator[tuple[_Image, Row]]:
    """Each image's row, in order."""
    images_HW3 = [rgb_HW3.result() for _, rgb_HW3 in batch if rgb_HW3.exception() is None]
    if content.of_images and len(images_HW3) > 1:
        rest = iter(content.of_images(images_HW3))
    else:
        rest = iter([partial(content.of_image, rgb_HW3) for rgb_HW3 in images_HW3])
    for image, rgb_HW3 in batch:
        if len(batch) > 1:
            on_begin(image.row.image_id, image.row.ref.uri)
        yield image, _outcome(image.row, rgb_HW3, rest, content)


@contextmanager
def _timed(image: _Image, phase: Phase) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        image.seconds[phase] = time.perf_counter() - start


def _reading(done: _Image, behind: list[_Image]) -> Reading:
    decoded = sum("decode" in image.seconds for image in behind)
    fetched = sum("fetch" in image.seconds for image in behind)
    return Reading(done.bytes, sum(image.begun for image in behind), fetched - decoded, decoded)


def _outcome(
    row: ManifestRow, decoded: Future[NDArray[np.uint8]], rest: Iterator[Callable[[], Row]], content: Content
) -> Row:
    """An image's row; `rest` makes those of the images that were decoded, this one and those behind it."""
    outcome: Row = {
        "image_id": row.image_id,
        "uri": row.ref.uri,
        "status": Status.OK,
        "error": None,
        "height": None,
        "width": None,
    }
    try:
        rgb_HW3 = decoded.result()
        outcome["height"], outcome["width"] = rgb_HW3.shape[:2]
        outcome |= next(rest)()
    except ImageError as error:
        outcome |= _failure(error.status, str(error), content)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        outcome |= _failure(Status.OUT_OF_MEMORY, f"no memory for this image: {error!r}", content)
    return outcome


def _failure(status: Status, error: str, content: Content) -> Row:
    return {"status": status, "error": storage.redact(error)} | content.of_failure


def ahead(
    pool: ThreadPoolExecutor, work: Callable[[_Item], _Result], items: Iterable[_Item], depth: int
) -> Iterator[Future[_Result]]:
    """Futures of `work` on each item, in order, with at most `depth` begun before they are asked for."""
    pending: deque[Future[_Result]] = deque()
    for item in items:
        pending.append(pool.submit(work, item))
        if len(pending) > depth:
            yield pending.popleft()
    yield from pending
