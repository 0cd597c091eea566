"""Shards of masks that others made: SA-1B's annotations as rows. The images themselves are not read."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from pipeline import manifest, sa1b, storage
from pipeline.config import ImportConfig
from pipeline.contents import Row
from pipeline.errors import ImageError
from pipeline.manifest import ManifestRow
from pipeline.outcomes import ahead
from pipeline.shard import ShardSummary, shard_uri, write_shard
from schemas.masks import MASKS_SCHEMA, Status


def import_shard(shard: int, config: ImportConfig, provenance: dict[str, Any]) -> ShardSummary:
    """Make the rows of a shard's images from the JSON beside each, and write its file, whole or not at all.

    Args:
        shard: Its number.
        config: The run's settings.
        provenance: JSON for the footer.

    Raises:
        StorageError: the manifest cannot be read or the file cannot be written.
    """
    rows = _rows(manifest.read_shard(config.output, shard), config.reading.read_ahead)
    return write_shard(shard_uri(config.output, config.kind, shard), shard, rows, MASKS_SCHEMA, provenance)


def _rows(images: list[ManifestRow], read_ahead: int) -> Iterator[Row]:
    def fetch(image: ManifestRow) -> bytes:
        return sa1b.fetch_annotations(image.ref)

    with ThreadPoolExecutor(read_ahead, "annotations") as pool:
        for image, fetched in zip(images, ahead(pool, fetch, images, read_ahead), strict=True):
            yield {"image_id": image.image_id, "uri": image.ref.uri} | _columns(fetched)


def _columns(fetched: Future[bytes]) -> Row:
    try:
        height, width, masks = sa1b.parse(fetched.result())
    except ImageError as error:
        return {"status": error.status, "error": storage.redact(str(error)), "masks": []}
    status = Status.OK if masks else Status.EMPTY
    return {"status": status, "error": None, "height": height, "width": width, "masks": masks}
