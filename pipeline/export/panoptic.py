"""COCO's panoptic format: a PNG an image whose colours are numbers, and a JSON: https://cocodataset.org/#format-data."""

import json
import tempfile
from typing import Any, Final

import numpy as np

from pipeline import storage
from pipeline.contents import Row
from pipeline.curation.config import Priority
from pipeline.export.coco import box_of_pixels, image_of
from pipeline.export.dataset import CATEGORY, Account, Dataset, Exported, export_each, too_many
from pipeline.export.labels import hidden, labelled, name_of, png_of

_MOST: Final = 2**24 - 1
_THREADS: Final = 2  # a picture of 12,000 x 12,000 pixels takes a gigabyte here
_IN_MEMORY_BYTES: Final = 2**26
_CATEGORIES: Final = [
    {"id": 1, "name": CATEGORY, "supercategory": CATEGORY, "isthing": 1, "color": [220, 20, 60]},
]


def export_panoptic(dataset: Dataset, output: str, account: Account, priority: Priority) -> None:
    """Write `panoptic/IMAGEID.png`, twelve digits, for each image, and `panoptic.json`.

    A segment's id is its mask's place in the row plus 1; a pixel is id % 256, id // 256 % 256, id // 65536. Left
    out are masks of which nothing is left where they overlap, and images of more than 16,777,215 masks.

    Raises:
        StorageError: the dataset cannot be read, or a file not be written.
    """

    def export(row: Row) -> Exported:
        if (refused := too_many(row, _MOST)) is not None:
            return refused
        masks, labels_HW = labelled(row, priority, np.uint32)
        name = name_of(row)
        storage.write_atomic(f"{output}/panoptic/{name}", png_of(_colours(labels_HW)))
        annotation = {
            "image_id": row["image_id"],
            "file_name": name,
            "segments_info": [_segment(mask, number) for number, mask in enumerate(masks, 1) if mask["area"]],
        }
        text = json.dumps(image_of(row, dataset)) + "\n" + json.dumps(annotation) + "\n"
        return Exported(True, len(annotation["segments_info"]), hidden(row["image_id"], masks), text)

    with (
        tempfile.SpooledTemporaryFile(_IN_MEMORY_BYTES, "w+b") as file,
        tempfile.SpooledTemporaryFile(_IN_MEMORY_BYTES, "w+b") as annotations,
    ):
        head = {"info": {"description": "everymask"}, "licenses": [], "categories": _CATEGORIES}
        file.write(json.dumps(head)[:-1].encode() + b', "images": [')
        comma = b"\n"
        for exported in export_each(dataset.rows(account), export, account, threads=_THREADS):
            if exported.text:
                image, annotation, _ = exported.text.split("\n")
                file.write(comma + image.encode())
                annotations.write(comma + annotation.encode())
                comma = b",\n"
        file.write(b'], "annotations": [')
        annotations.seek(0)
        while block := annotations.read(2**20):
            file.write(block)
        file.write(b"]}\n")
        storage.write_atomic(f"{output}/panoptic.json", file)


def _colours(labels_HW: Any) -> Any:
    """uint8 H x W x 3, red the lowest byte."""
    return np.ascontiguousarray(labels_HW, dtype="<u4").view(np.uint8).reshape(*labels_HW.shape, 4)[..., :3]


def _segment(mask: Row, number: int) -> dict[str, Any]:
    return {
        "id": number,
        "category_id": 1,
        "area": mask["area"],
        "bbox": box_of_pixels(mask["segmentation"]),
        "iscrowd": 0,
    }
