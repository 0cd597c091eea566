"""A masks dataset that this project made, as training examples."""

import bisect
from functools import lru_cache
from itertools import accumulate
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import manifest, sources, storage
from pipeline.amg import rle
from pipeline.errors import ImageError, TrainingDataError
from pipeline.images import decode_image
from pipeline.run import kind_of, read_document, shards_done
from pipeline.shard import shard_uri
from pipeline.training.examples import MASKS, Example, Random, Rgb
from pipeline.training.lessons import Skipped
from schemas.masks import Status

_SHARDS_KEPT: Final = 256  # footers and listings
_ROW_GROUPS_KEPT: Final = 16
_TRIES: Final = 100


class _Shard(NamedTuple):
    """What must be known of a shard to read some of it."""

    footer: pq.FileMetaData
    first_rows: list[int]
    """Of each row group, and the number of all."""
    listed: list[manifest.ManifestRow]


class MasksSource:
    """Draws images of a dataset with their masks; the images are read where they lay when it was made.

    What is drawn follows from the generator alone. A draw reads the row group of its image, of 64, and the last
    ones stay in memory.

    Attributes:
        identity: What decides the examples, as JSON.
        skipped: Images that can no longer be read as they were when their masks were made.
    """

    def __init__(self, output: str) -> None:
        """Look at a dataset; its shards may be some of the run's.

        Args:
            output: What jobs.generate_masks was given as --output.

        Raises:
            OutputConflict: there is no run.
            TrainingDataError: it is not of masks, or no shard is finished.
            StorageError: it cannot be read.
        """
        self._output = storage.canonical_uri(output)
        document = read_document(self._output)
        self._shards = sorted(shards_done(self._output, "masks"))
        if kind_of(document) != "masks" or not self._shards:
            raise TrainingDataError(f"{storage.redact(self._output)} holds no finished shard of masks.")
        listing, reading = document["manifest"], document["determinants"]["reading"]
        per_shard = document["determinants"]["images_per_shard"]
        sizes = [min(per_shard, listing["images"] - shard * per_shard) for shard in self._shards]
        self._shares = np.array(sizes) / sum(sizes)
        self._max_bytes, self._max_pixels = reading["max_bytes"], reading["max_pixels"]
        self.identity: dict[str, Any] = {
            "fingerprint": document["fingerprint"],
            "manifest_digest": listing["digest"],
            "shards": len(self._shards),
        }
        self.skipped = Skipped()
        self._shard = lru_cache(_SHARDS_KEPT)(self._read_shard)
        self._row_group = lru_cache(_ROW_GROUPS_KEPT)(self._read_row_group)

    def __call__(self, rng: Random) -> Example:
        """An image and some of its masks, as many as an example may have.

        Images without masks are passed over. Those that cannot be read, or have another size than their masks,
        are also counted and named in the log.

        Raises:
            StorageError, TrainingDataError: the dataset is damaged, or images one after another give nothing.
        """
        for _ in range(_TRIES):
            number = int(rng.choice(self._shards, p=self._shares))
            shard = self._shard(number)
            group = bisect.bisect_right(shard.first_rows, rng.integers(shard.first_rows[-1])) - 1
            table = self._row_group(number, group)
            with_masks = [i for i, status in enumerate(table["status"].to_pylist()) if status == Status.OK]
            if not with_masks:
                continue
            place = with_masks[rng.integers(len(with_masks))]
            row: dict[str, Any] = table.slice(place, 1).to_pylist()[0]
            try:
                rgb_HW3 = self._picture(row, shard.listed[shard.first_rows[group] + place])
            except ImageError as error:
                self.skipped.failure(row["image_id"], error)
                continue
            masks = row["masks"]
            if len(masks) > MASKS:
                masks = [masks[i] for i in np.sort(rng.choice(len(masks), MASKS, replace=False))]
            masks_NHW = np.stack([rle.decode(mask["segmentation"]) for mask in masks])
            return Example(storage.redact(row["uri"]), rgb_HW3, masks_NHW)
        raise TrainingDataError(
            f"{_TRIES} draws from {storage.redact(self._output)} one after another give no image with masks; "
            f"{self.skipped.images} images could not be read."
        )

    def _picture(self, row: dict[str, Any], listed: manifest.ManifestRow) -> Rgb:
        """Read one picture again.

        Raises:
            ImageError: it cannot be read, or is not the one that the masks are of.
        """
        rgb_HW3 = decode_image(sources.fetch(listed.ref, max_bytes=self._max_bytes), max_pixels=self._max_pixels)
        if rgb_HW3.shape[:2] != (row["height"], row["width"]):
            raise ImageError(
                Status.CHANGED,
                f"{storage.redact(row['uri'])}: {rgb_HW3.shape[:2]} pixels, its masks have "
                f"{(row['height'], row['width'])}",
            )
        return rgb_HW3

    def _read_shard(self, number: int) -> _Shard:
        uri = shard_uri(self._output, "masks", number)
        try:
            with storage.open_input(uri) as file:
                footer = pq.read_metadata(file)
        except (pa.ArrowException, OSError) as error:
            raise _damaged(uri, error) from error
        rows = (footer.row_group(group).num_rows for group in range(footer.num_row_groups))
        listed = manifest.read_shard(self._output, number)
        if footer.num_rows != len(listed) or not listed:
            raise _damaged(uri, f"{footer.num_rows} rows for {len(listed)} images")
        return _Shard(footer, list(accumulate(rows, initial=0)), listed)

    def _read_row_group(self, number: int, group: int) -> pa.Table:
        uri = shard_uri(self._output, "masks", number)
        try:
            with storage.open_input(uri) as file:
                return pq.ParquetFile(file, metadata=self._shard(number).footer).read_row_group(group)
        except (pa.ArrowException, OSError) as error:
            raise _damaged(uri, error) from error


def _damaged(uri: str, what: object) -> TrainingDataError:
    return TrainingDataError(
        f"{storage.redact(uri)} is damaged: {what}. jobs.verify_masks --remove-damaged deletes it, and the "
        "command that made it makes it again."
    )
