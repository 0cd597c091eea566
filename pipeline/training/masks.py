"""A masks dataset that this project made, as training examples."""

import bisect
from typing import Any, Final

import numpy as np

from pipeline import rle, storage
from pipeline.errors import ImageError, TrainingDataError
from pipeline.reading.skipped import Skipped
from pipeline.reading.stored import ShardReader, read_picture, stored_masks
from pipeline.training.examples import MASKS, Example, Random
from schemas.masks import Status

_TRIES: Final = 100


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
            SettingsError: it has a newer schema than this version reads.
            TrainingDataError: no shard is finished.
            StorageError: it cannot be read.
        """
        self._stored = stored_masks(output)
        if not self._stored.shards:
            raise TrainingDataError(f"{storage.redact(self._stored.output)} holds no finished shard of masks.")
        sizes = [self._stored.images_in(shard) for shard in self._stored.shards]
        self._shares = np.array(sizes) / sum(sizes)
        self.identity: dict[str, Any] = self._stored.identity
        self.skipped = Skipped()
        self._reader = ShardReader(self._stored)

    def __call__(self, rng: Random) -> Example:
        """An image and some of its masks, as many as an example may have.

        Images without masks are passed over. Those that cannot be read, or have another size than their masks,
        are also counted and named in the log.

        Raises:
            StorageError, TrainingDataError: the dataset is damaged, or images one after another give nothing.
        """
        for _ in range(_TRIES):
            number = int(rng.choice(self._stored.shards, p=self._shares))
            shard = self._reader.shard(number)
            group = bisect.bisect_right(shard.first_rows, rng.integers(shard.first_rows[-1])) - 1
            table = self._reader.row_group(number, group)
            with_masks = [i for i, status in enumerate(table["status"].to_pylist()) if status == Status.OK]
            if not with_masks:
                continue
            place = with_masks[rng.integers(len(with_masks))]
            row: dict[str, Any] = table.slice(place, 1).to_pylist()[0]
            try:
                rgb_HW3 = read_picture(self._stored, row, shard.listed[shard.first_rows[group] + place])
            except ImageError as error:
                self.skipped.failure(row["image_id"], error)
                continue
            masks = row["masks"]
            if len(masks) > MASKS:
                masks = [masks[i] for i in np.sort(rng.choice(len(masks), MASKS, replace=False))]
            masks_NHW = np.stack([rle.decode(mask["segmentation"]) for mask in masks])
            return Example(storage.redact(row["uri"]), rgb_HW3, masks_NHW)
        raise TrainingDataError(
            f"{_TRIES} draws from {storage.redact(self._stored.output)} one after another give no image with "
            f"masks; {self.skipped.images} images could not be read."
        )
