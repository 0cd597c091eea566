"""A JSON an image with the keys of SA-1B: https://ai.meta.com/datasets/segment-anything-downloads/."""

import json
from collections.abc import Iterator
from typing import Any, Final

from pipeline import storage
from pipeline.export.dataset import Account, Dataset, Exported, Named, export_each, named_rows, number_or_none
from pipeline.sa1b import ACCOUNT

_THREADS: Final = 8


def export_sa1b(dataset: Dataset, output: str, account: Account) -> None:
    """Write `NAME.json` for each image; annotations are numbered from 1 through all images.

    NAME is the image's own below the input, without its suffix, by which `jobs.import_sa1b` and
    `jobs.evaluate_masks` find it. Left out are images whose file another one has, and
    one whose file would be `export.json`.

    Raises:
        StorageError: the dataset cannot be read, or a file not be written.
    """

    def export(item: tuple[int, Named]) -> Exported:
        before, (name, taken, row) = item
        if taken:
            what = f"image {row['image_id']}, {name}"
            return Exported(False, 0, [("image whose file's name is taken", what)])
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
        storage.write_atomic(f"{output}/{name}", text.encode())
        return Exported(True, len(row["masks"]), [])

    for _ in export_each(
        _numbered(named_rows(dataset, account, ".json", [ACCOUNT])), export, account, threads=_THREADS
    ):
        pass


def _numbered(items: Iterator[Named]) -> Iterator[tuple[int, Named]]:
    """Each row with the number of masks that are written before it."""
    before = 0
    for item in items:
        yield before, item
        before += 0 if item.taken else len(item.row["masks"])


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
