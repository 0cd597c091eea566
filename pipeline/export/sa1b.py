"""A JSON an image with the keys of SA-1B: https://ai.meta.com/datasets/segment-anything-downloads/."""

import json
from collections.abc import Iterator
from typing import Any, Final

from pipeline import storage
from pipeline.contents import Row
from pipeline.export.dataset import Account, Dataset, Exported, export_each, number_or_none

_THREADS: Final = 8


def export_sa1b(dataset: Dataset, output: str, account: Account) -> None:
    """Write `sa_IMAGEID.json` for each image; annotations are numbered from 1 through all images.

    Raises:
        StorageError: the dataset cannot be read, or a file not be written.
    """

    def export(item: tuple[int, Row]) -> Exported:
        before, row = item
        document = {
            "image": {
                "image_id": row["image_id"],
                "width": row["width"],
                "height": row["height"],
                "file_name": dataset.file_name(row["uri"]),
            },
            "annotations": [_annotation(mask, before + place) for place, mask in enumerate(row["masks"], 1)],
        }
        text = json.dumps(document, allow_nan=False)
        storage.write_atomic(f"{output}/sa_{row['image_id']}.json", text.encode())
        return Exported(True, len(row["masks"]), [])

    for _ in export_each(_numbered(dataset.rows(account)), export, account, threads=_THREADS):
        pass


def _numbered(rows: Iterator[Row]) -> Iterator[tuple[int, Row]]:
    """Each row with the number of masks in those before it."""
    before = 0
    for row in rows:
        yield before, row
        before += len(row["masks"])


def _annotation(mask: dict[str, Any], number: int) -> dict[str, Any]:
    return {
        "id": number,
        "segmentation": mask["segmentation"],
        "bbox": mask["bbox"],
        "area": mask["area"],
        "predicted_iou": number_or_none(mask["predicted_iou"]),
        "stability_score": number_or_none(mask["stability_score"]),
        "crop_box": mask["crop_box"],
        "point_coords": mask["point_coords"],
    }
