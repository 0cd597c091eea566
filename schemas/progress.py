"""`progress.json`: how far the command is that makes a run's shards, or how far the last one came."""

from typing import Final, Literal

from typing_extensions import TypedDict  # pydantic checks no other before Python 3.12

SCHEMA_VERSION: Final = 1

State = Literal["running", "complete", "incomplete", "interrupted", "too_many_failures"]
"""Those of `summary.json`, and running."""


class ImageInWork(TypedDict):
    """The image that a worker has at hand."""

    image_id: int
    uri: str
    seconds: float
    """Since the worker turned to it, waiting for its bytes included."""


class ShardInWork(TypedDict):
    """A shard that a worker makes."""

    shard: int
    attempt: int
    """From 1; each one beyond is a worker that died."""
    seconds: float
    """Since this attempt began."""
    silent_seconds: float
    """Since its worker was last heard of, which reports every second."""
    images: int
    """Done of it."""
    of: int
    """Images of it."""
    masks: int
    failed: int
    image: ImageInWork | None
    """None before the first and after the last."""
    died_at: ImageInWork | None
    """What the last worker that died with this shard had at hand, as of its last report."""


class SlowImage(TypedDict):
    """An image that is done."""

    image_id: int
    uri: str
    seconds: float
    """Of its worker's time."""
    status: str


class SlowShard(TypedDict):
    """A shard that is done."""

    shard: int
    seconds: float
    images: int


class FailedShard(TypedDict):
    """A shard that this command leaves without a file."""

    shard: int
    error: str


class Progress(TypedDict):
    """Counts and rates are this command's own, unless they say otherwise. Addresses are without credentials."""

    schema_version: int
    run_id: str
    """The first 12 digits of the fingerprint."""
    fingerprint: str
    state: State
    started: str
    """UTC, ISO 8601."""
    updated: str
    """UTC, ISO 8601; by the clock of the machine that runs the command."""
    seconds: float
    """Between the two."""
    images: int
    """Images in the manifest, as far as it is written."""
    listed: bool
    """Whether these are all that are under the address. If not, listing goes on, and there may be more."""
    images_before: int
    """Of shards that were finished before this command began."""
    images_done: int
    """By this command, in finished shards and in those in work."""
    failed: int
    failures: dict[str, int]
    """Failed images by status."""
    masks: int
    """0 in a run of embeddings."""
    images_per_second: float
    """Since `started`."""
    images_per_second_recent: float
    """Within about the last minute."""
    masks_per_second: float
    masks_per_second_recent: float
    seconds_left: float | None
    """At the recent rate; None where nothing is known yet, and while images are listed."""
    seconds_per_image: float | None
    """Of a worker's time, on average, without the images at hand; None before the first."""
    shards: int
    """Shards in the manifest, as far as it is written."""
    shards_before: int
    """Finished before this command began."""
    shards_done: int
    """By this command."""
    workers: int | None
    """That make a shard and were heard of within the last 15 seconds. None while Ray starts, and in curations and
    imports, whose shards in work are not known either."""
    workers_died: int
    """While they made a shard."""
    shards_in_work: int
    in_work: list[ShardInWork]
    """At most 100 of them, those first whose image has been at hand for longest."""
    shards_failed: int
    failed_shards: list[FailedShard]
    """At most the first 100."""
    slowest_images: list[SlowImage]
    """At most 10, slowest first."""
    slowest_shards: list[SlowShard]
    """At most 10, slowest first."""
