"""One sample of a masks dataset: an image and all of its masks as tensors. And a dataset that fits into memory."""

import logging
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import pyarrow.compute as pc
import torch
from torch.utils.data import Dataset

from pipeline import manifest, rle, storage
from pipeline.errors import ImageError
from pipeline.manifest import ManifestRow
from pipeline.reading.order import At
from pipeline.reading.skipped import Skipped
from pipeline.reading.stored import StoredMasks, open_masks, read_picture, stored_masks
from pipeline.rle import Rle
from schemas.masks import Status

_log = logging.getLogger("everymask")

Form = Literal["bool", "rle"]
Row = dict[str, Any]


class Sample(NamedTuple):
    """An image with its N masks, in the order of the dataset."""

    image_id: int
    uri: str
    image_3HW: torch.Tensor | None
    """uint8, RGB. None where it was not asked for, or cannot be read."""
    masks: torch.Tensor | list[Rle]
    """bool N x H x W, or N RLEs."""
    boxes_N4_xyxy: torch.Tensor
    """float32, in pixels. x1 and y1 lie behind the last column and row, as torchvision has them; of a mask without
    pixels all are 0."""
    predicted_iou_N: torch.Tensor
    """float32."""
    stability_N: torch.Tensor
    """float32; NaN where there is no score."""
    parent_N: torch.Tensor | None
    """int64, which of the N masks is each one's parent, -1 where it has none. None where the dataset is not
    curated."""
    depth_N: torch.Tensor | None
    """int64, 0 for a root, -1 where no hierarchy was asked for. None where the dataset is not curated."""
    problem: str | None
    """Why the image cannot be read."""
    at: At
    """Where a stream is behind this sample."""


_NOWHERE: Final = At()


class MaskTable(Dataset[Sample]):
    """A masks dataset by number, its rows held in memory as Arrow; images are read when they are asked for.

    Worker processes that are forked share the rows; those of `spawn` and `forkserver` have a copy each.

    Its samples are the images with masks, by `image_id`. An image that is gone or has changed is counted and named
    in the log, and its sample comes without it, with a `problem`: a number cannot be skipped.

    Attributes:
        skipped: Images that could not be read, in this process.
    """

    def __init__(self, uri: str, *, masks: Form = "bool", images: bool = True, with_empty: bool = False) -> None:
        """Read a dataset's rows, and its manifest.

        Args:
            uri: What the command that made it was given as --output.
            masks: As bool N x H x W, or as RLEs.
            images: Whether the images are read.
            with_empty: Also give images in which no mask was found.

        Raises:
            OutputConflict, SettingsError, TrainingDataError, StorageError: as `pipeline.reading.stored_masks`; or
                it is damaged.
        """
        self._stored = stored_masks(uri)
        warn_of_missing(self._stored)
        self._form, self._images, self.skipped = masks, images, Skipped()
        wanted = [status.value for status in wanted_statuses(with_empty=with_empty)]
        table = open_masks(uri).to_table(filter=pc.field("status").isin(wanted))
        self._batches = table.to_batches()  # as read: one array cannot hold 2 GiB of text
        self._ends = np.cumsum([batch.num_rows for batch in self._batches], dtype=np.int64)
        self._order = np.argsort(table["image_id"].to_numpy(), kind="stable")
        shards = self._stored.shards if images else ()
        self._listed = {row.image_id: row for n in shards for row in manifest.read_shard(self._stored.output, n)}

    def __len__(self) -> int:
        """How many samples there are."""
        return len(self._order)

    def __getitem__(self, index: int) -> Sample:
        """A sample; `IndexError` beyond the last."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        at = int(self._order[index])
        number = int(np.searchsorted(self._ends, at, side="right"))
        batch = self._batches[number]
        row: Row = batch.slice(at - int(self._ends[number]) + batch.num_rows, 1).to_pylist()[0]
        if not self._images:
            return sample_of(row, self._form)
        return sample_with_image(self._stored, row, self._listed[row["image_id"]], self._form, self.skipped)


def wanted_statuses(*, with_empty: bool) -> tuple[Status, ...]:
    """Of the rows that become samples."""
    return (Status.OK, Status.EMPTY) if with_empty else (Status.OK,)


def sample_with_image(stored: StoredMasks, row: Row, listed: ManifestRow, form: Form, skipped: Skipped) -> Sample:
    """A row's sample with its image. Where that cannot be read, without it, and `skipped` is told."""
    try:
        rgb_HW3 = read_picture(stored, row, listed)
    except ImageError as error:
        skipped.failure(row["image_id"], error)
        return sample_of(row, form)._replace(problem=f"{error.status}: {storage.redact(str(error))}")
    return sample_of(row, form)._replace(image_3HW=torch.from_numpy(rgb_HW3).permute(2, 0, 1).contiguous())


def sample_of(row: Row, form: Form) -> Sample:
    """A row of the masks table, curated or not, as tensors, without its image."""
    curated = "coverage" in row
    masks: list[Row] = row["masks"]
    rles: list[Rle] = [mask["segmentation"] for mask in masks]
    decoded = torch.from_numpy(rle.decode_all(rles, (row["height"], row["width"]))) if form == "bool" else rles
    boxes = torch.tensor([mask["bbox"] for mask in masks], dtype=torch.float32).reshape(-1, 4)
    filled_N = torch.tensor([mask["area"] > 0 for mask in masks], dtype=torch.float32)
    corners = torch.cat([boxes[:, :2], (boxes[:, :2] + boxes[:, 2:] + 1) * filled_N[:, None]], dim=1)
    return Sample(
        image_id=row["image_id"],
        uri=row["uri"],
        image_3HW=None,
        masks=decoded,
        boxes_N4_xyxy=corners,
        predicted_iou_N=torch.tensor([mask["predicted_iou"] for mask in masks], dtype=torch.float32),
        stability_N=torch.tensor([mask["stability_score"] for mask in masks], dtype=torch.float32),
        parent_N=_places(masks, "parent_id") if curated else None,
        depth_N=_places(masks, "depth") if curated else None,
        problem=None,
        at=_NOWHERE,
    )


def _places(masks: list[Row], name: str) -> torch.Tensor:
    return torch.tensor([-1 if mask[name] is None else mask[name] for mask in masks], dtype=torch.int64)


def warn_of_missing(stored: StoredMasks) -> None:
    """Tell that a dataset is not whole."""
    if stored.missing:
        _log.warning(
            "%s lacks %d of %d shards; the command that began it makes them. Their images are left out.",
            storage.redact(stored.output),
            stored.missing,
            stored.missing + len(stored.shards),
        )
