"""One COCO JSON of all images, in which masks are compressed RLE: https://cocodataset.org/#format-data."""

import json
import tempfile
from typing import IO, Any, Final

from pycocotools import mask as coco

from pipeline import storage
from pipeline.contents import Row
from pipeline.export.dataset import CATEGORY, Account, Dataset, number_or_none

_IN_MEMORY_BYTES: Final = 2**26
CATEGORIES: Final = [{"id": 1, "name": CATEGORY, "supercategory": CATEGORY}]


def export_coco(dataset: Dataset, output: str, account: Account) -> None:
    """Write `instances.json`, which is made in a temporary file, an annotation after another.

    Beside COCO's keys an annotation has `predicted_iou`, `stability_score` (null where it is no number), and of a
    curated run with a hierarchy `parent_id`, the `id` of the annotation around it or null, and `depth`.

    Raises:
        StorageError: the dataset cannot be read, or the file not be written.
    """
    with tempfile.SpooledTemporaryFile(_IN_MEMORY_BYTES, "w+b") as file:
        _write(file, '{"info": {"description": "everymask"}, "licenses": [], "categories": ')
        _write(file, json.dumps(CATEGORIES) + ', "images": [')
        columns = ["image_id", "uri", "status", "height", "width"]
        for row in dataset.rows(account, columns):
            _write(file, (",\n" if account.images else "\n") + json.dumps(image_of(row, dataset)))
            account.images += 1
        _write(file, '], "annotations": [')
        for row in dataset.rows():
            first = account.masks + 1
            for place in range(len(row["masks"])):
                text = json.dumps(_annotation(row, place, first), allow_nan=False)
                _write(file, (",\n" if account.masks else "\n") + text)
                account.masks += 1
        _write(file, "]}\n")
        storage.write_atomic(f"{output}/instances.json", file)


def image_of(row: Row, dataset: Dataset) -> dict[str, Any]:
    """What COCO says of an image."""
    name = dataset.file_name(row["uri"])
    return {"id": row["image_id"], "file_name": name, "height": row["height"], "width": row["width"]}


def box_of_pixels(segmentation: Any) -> list[int]:
    """COCO's box, whose width and height count pixels, so that a mask of one pixel has a box of 1 x 1."""
    return [int(value) for value in coco.toBbox(segmentation)]


def _annotation(row: Row, place: int, first: int) -> dict[str, Any]:
    mask = row["masks"][place]
    annotation = {
        "id": first + place,
        "image_id": row["image_id"],
        "category_id": 1,
        "segmentation": mask["segmentation"],
        "area": mask["area"],
        "bbox": box_of_pixels(mask["segmentation"]),
        "iscrowd": 0,
        "predicted_iou": number_or_none(mask["predicted_iou"]),
        "stability_score": number_or_none(mask["stability_score"]),
    }
    if mask.get("depth") is not None:
        parent = mask["parent_id"]
        annotation |= {"parent_id": None if parent is None else first + parent, "depth": mask["depth"]}
    return annotation


def _write(file: IO[bytes], text: str) -> None:
    file.write(text.encode())
