"""A masks dataset that this project made, as training examples."""

from functools import lru_cache
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import manifest, sources, storage
from pipeline.amg import rle
from pipeline.config import ImagesConfig
from pipeline.errors import ImageError, TrainingDataError
from pipeline.images import decode_image
from pipeline.run import kind_of, read_document, shards_done
from pipeline.shard import shard_uri
from pipeline.training.examples import Example, Random, Source
from schemas.masks import Status

_SHARDS_KEPT: Final = 8
_TRIES: Final = 100


def masks_source(output: str) -> Source:
    """Draw images of a dataset with their masks; the images are read where they lay when it was made.

    Images without masks, and those that can no longer be read, are passed over.

    Args:
        output: What jobs.generate_masks was given as --output.

    Raises:
        OutputConflict: there is no run.
        TrainingDataError: it is not of masks, or no shard is finished.
        StorageError: it cannot be read.
    """
    output, reading = storage.canonical_uri(output), ImagesConfig()
    document = read_document(output)
    shards = sorted(shards_done(output, "masks"))
    if kind_of(document) != "masks" or not shards:
        raise TrainingDataError(f"{storage.redact(output)} holds no finished shard of masks.")
    per_shard, images = document["settings"]["images_per_shard"], document["manifest"]["images"]
    sizes = np.array([min(per_shard, images - shard * per_shard) for shard in shards])

    @lru_cache(_SHARDS_KEPT)
    def shard_of(shard: int) -> tuple[pa.Table, list[manifest.ManifestRow]]:
        with storage.open_input(shard_uri(output, "masks", shard)) as file:
            return pq.read_table(file), manifest.read_shard(output, shard)

    def draw(rng: Random) -> Example:
        for _ in range(_TRIES):
            table, listed = shard_of(int(rng.choice(shards, p=sizes / sizes.sum())))
            number = int(rng.integers(len(listed)))
            row: dict[str, Any] = table.slice(number, 1).to_pylist()[0]
            if row["status"] != Status.OK:
                continue
            try:
                data = sources.fetch(listed[number].ref, max_bytes=reading.max_bytes)
                rgb_HW3 = decode_image(data, max_pixels=reading.max_pixels)
            except ImageError:
                continue
            masks = np.stack([rle.decode(mask["segmentation"]) for mask in row["masks"]]).astype(bool)
            return Example(storage.redact(row["uri"]), rgb_HW3, masks)
        raise TrainingDataError(
            f"{_TRIES} images of {storage.redact(output)} in a row have no masks to train with."
        )

    return draw
