"""What a run would cost, told from a sample of its images, whose masks or embeddings are thrown away."""

import random
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from pipeline import manifest
from pipeline.amg.selfcheck import checked_model
from pipeline.config import RunConfig
from pipeline.decoding import Decoders
from pipeline.predict import content_of
from pipeline.shard import ShardSummary, make_shard
from pipeline.sources import ImageRef

MOST_SAMPLED: Final = 64
_FEWEST_SAMPLED: Final = 8
_SAMPLE_SECONDS: Final = 60.0  # that a sample may take, unless images are slower than that allows


class Drawn(NamedTuple):
    """Some images of a listing."""

    images: int
    """In the whole listing."""
    sample: list[ImageRef]
    """`MOST_SAMPLED` of them, or all; each subset is as likely as another."""


@dataclass(frozen=True)
class Estimate:
    """What a run would take, on machines as the one where the sample was made."""

    images: int
    sampled: int
    workers: int
    seconds: float
    """From Ray's start to the last shard."""
    worker_hours: float
    """GPU-hours where each worker has a GPU."""
    output_bytes: int
    masks: int


def draw(refs: Iterable[ImageRef]) -> Drawn:
    """Count a listing and take a sample, in one pass and constant memory (Vitter's algorithm R)."""
    order = random.Random(0)  # noqa: S311 (no secret)
    count, sample = 0, list[ImageRef]()
    for count, ref in enumerate(refs, start=1):
        if len(sample) < MOST_SAMPLED:
            sample.append(ref)
        elif (place := order.randrange(count)) < MOST_SAMPLED:
            sample[place] = ref
    order.shuffle(sample)
    return Drawn(count, sample)


def measure(config: RunConfig, sample: list[ImageRef]) -> ShardSummary:
    """Load the model, make the first image, then one shard of as many as about a minute allows.

    Args:
        config: The run's settings; its output is not touched.
        sample: One image at least.

    Returns:
        What that shard was and took.

    Raises:
        CheckpointError, SettingsError, SelfCheckError, StorageError: as `checked_model` and `make_shard`.
    """
    content = content_of(config, checked_model(config.model, kernels=config.kernels))

    def shard_of(refs: list[ImageRef]) -> ShardSummary:
        with tempfile.TemporaryDirectory(prefix="everymask-estimate-") as folder:
            here = config.model_copy(update={"output": Path(folder).as_uri()})
            manifest.write_manifest(refs, here.output, images_per_shard=len(refs))
            return make_shard(0, here, content, decode, {})

    with Decoders(config.reading) as decode:
        first = shard_of(sample[:1])
        some = max(_FEWEST_SAMPLED, int(_SAMPLE_SECONDS / max(first.seconds, 1e-3)))
        return shard_of(sample[:some])


def estimate(
    drawn: Drawn, made: ShardSummary, startup_seconds: float, images_per_shard: int, workers: int
) -> Estimate:
    """The whole run, as its sample was.

    Args:
        drawn: The listing.
        made: Its sample.
        startup_seconds: From Ray's start to a worker that has made an image.
        images_per_shard: Of the run.
        workers: At most.
    """
    each = made.seconds / made.images
    shards = -(-drawn.images // images_per_shard)
    workers = min(workers, shards)
    # Whole shards go to workers: the one with most of them decides.
    longest = min(drawn.images, -(-shards // workers) * images_per_shard)
    return Estimate(
        images=drawn.images,
        sampled=made.images,
        workers=workers,
        seconds=round(startup_seconds + each * longest, 1),
        worker_hours=round((workers * startup_seconds + each * drawn.images) / 3600, 4),
        output_bytes=round(made.bytes / made.images * drawn.images),
        masks=round(made.masks / made.images * drawn.images),
    )
