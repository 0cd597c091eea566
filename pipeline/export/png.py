"""A 16-bit gray PNG an image, in which each pixel is the number of its mask."""

import csv
import io
import tempfile
from typing import Final

import numpy as np

from pipeline import storage
from pipeline.contents import Row
from pipeline.curation.config import Priority
from pipeline.export.dataset import Account, Dataset, Exported, export_each, too_many
from pipeline.export.labels import hidden, labelled, name_of, png_of

_MOST: Final = 2**16 - 1
_THREADS: Final = 2  # a picture of 12,000 x 12,000 pixels takes half a gigabyte here
_IN_MEMORY_BYTES: Final = 2**26


def export_png(dataset: Dataset, output: str, account: Account, priority: Priority) -> None:
    """Write `IMAGEID.png`, twelve digits, for each image, and `images.csv` with the images' names.

    0 is no mask, n is the mask at place n - 1 of the row. Left out are masks of which nothing is left where they
    overlap, and images of more than 65,535 masks.

    Raises:
        StorageError: the dataset cannot be read, or a file not be written.
    """

    def export(row: Row) -> Exported:
        if (refused := too_many(row, _MOST)) is not None:
            return refused
        masks, labels_HW = labelled(row, priority, np.uint16)
        name = name_of(row)
        storage.write_atomic(f"{output}/{name}", png_of(labels_HW.astype(np.uint16, copy=False)))
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow([row["image_id"], name, dataset.file_name(row["uri"])])
        left_out = hidden(row["image_id"], masks)
        return Exported(True, len(masks) - len(left_out), left_out, line.getvalue())

    with tempfile.SpooledTemporaryFile(_IN_MEMORY_BYTES, "w+b") as file:
        file.write(b"image_id,png,file_name\n")
        for exported in export_each(dataset.rows(account), export, account, threads=_THREADS):
            file.write(exported.text.encode())
        storage.write_atomic(f"{output}/images.csv", file)
