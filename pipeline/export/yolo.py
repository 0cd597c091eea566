"""YOLO's segmentation labels, a polygon a line: https://docs.ultralytics.com/datasets/segment/.

A polygon has no holes and no second piece, so it is often not the mask itself: what is lost is told of every mask.
"""

import tempfile
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline import storage
from pipeline.curation.arithmetic import in_box
from pipeline.curation.filters import Record
from pipeline.export.dataset import CATEGORY, Account, Dataset, Exported, Named, export_each, named_rows

_THREADS: Final = 4
_IN_MEMORY_BYTES: Final = 2**26
_LOW: Final = 0.9
# Without `path`, which Ultralytics takes from the folder it is started in, all is below the file's own folder.
_DATA: Final = f"train: images\nval: images\nnames:\n  0: {CATEGORY}\n"


def export_yolo(dataset: Dataset, output: str, account: Account, tolerance: float) -> dict[str, float]:
    """Write `labels/NAME.txt` for each image, `data.yaml` with the one class, and `iou.csv`.

    NAME is the image's own below the input, without its suffix. `iou.csv` has the IoU of each mask with its
    polygon as readers fill it, 0 where there is none. Left out are masks whose polygon has no area, and images
    whose label file another one has.

    Returns:
        The IoU's mean and least, and how many masks have less than 0.9.

    Raises:
        StorageError: the dataset cannot be read, or a file not be written.
    """

    def export(item: Named) -> Exported:
        name, taken, row = item
        if taken:
            what = f"image {row['image_id']}, {name}"
            return Exported(False, 0, [("image whose label file another one has", what)])
        lines, ious, left_out = [], [], []
        for place, mask in enumerate(row["masks"]):
            polygon_n2 = polygon_of(mask, tolerance)
            if polygon_n2 is None:
                left_out.append(("mask whose polygon has no area", f"image {row['image_id']}, mask {place}"))
                ious.append(0.0)
                continue
            ious.append(iou_of(mask, polygon_n2))
            scaled_n2 = (polygon_n2 + 0.5) / [row["width"], row["height"]]
            lines.append(" ".join(["0", *(f"{value:.7f}" for value in scaled_n2.ravel())]) + "\n")
        storage.write_atomic(f"{output}/labels/{name}", "".join(lines).encode())
        text = "".join(f"{row['image_id']},{place},{iou:.6f}\n" for place, iou in enumerate(ious))
        return Exported(True, len(lines), left_out, text, tuple(ious))

    count, total, least, low = 0, 0.0, 1.0, 0
    with tempfile.SpooledTemporaryFile(_IN_MEMORY_BYTES, "w+b") as file:
        file.write(b"image_id,mask,iou\n")
        for exported in export_each(named_rows(dataset, account, ".txt"), export, account, threads=_THREADS):
            file.write(exported.text.encode())
            count, total = count + len(exported.ious), total + sum(exported.ious)
            least = min((least, *exported.ious))
            low += sum(iou < _LOW for iou in exported.ious)
        storage.write_atomic(f"{output}/iou.csv", file)
    storage.write_atomic(f"{output}/data.yaml", _DATA.encode())
    return {"mean_iou": total / count if count else 1.0, "least_iou": least, "below_0.9": low}


def polygon_of(mask: Record, tolerance: float) -> NDArray[np.int64] | None:
    """A mask as one polygon through the centres of its outer pixels, n x 2 x and y; None if it would have no area.

    Holes are filled. Pieces apart from the largest are joined to it by a line there and back, as Ultralytics'
    converter of COCO does; pieces of no area are left out.
    """
    if not mask["area"]:
        return None
    pixels_HW = in_box(mask["segmentation"], mask["bbox"])
    contours, _ = cv2.findContours(pixels_HW.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    if tolerance:
        contours = [cv2.approxPolyDP(contour, tolerance, closed=True) for contour in contours]
    pieces = sorted(((cv2.contourArea(contour), contour[:, 0]) for contour in contours), key=lambda p: -p[0])
    pieces_n2: list[NDArray[np.int64]] = [piece.astype(np.int64) for area, piece in pieces if area > 0]
    if not pieces_n2:
        return None
    polygon_n2 = pieces_n2[0]
    for piece_n2 in pieces_n2[1:]:
        leave = _nearest(polygon_n2, piece_n2[0])
        arrive = _nearest(piece_n2, polygon_n2[leave])
        there_and_back = (polygon_n2[: leave + 1], piece_n2[arrive:], piece_n2[: arrive + 1], polygon_n2[leave:])
        polygon_n2 = np.concatenate(there_and_back)
    polygon_n2 += mask["bbox"][:2]
    return polygon_n2


def _nearest(points_n2: NDArray[np.int64], point_2: NDArray[np.int64]) -> int:
    return int(((points_n2 - point_2) ** 2).sum(1).argmin())


def iou_of(mask: Record, polygon_n2: NDArray[np.int64]) -> float:
    """IoU of a mask with a polygon inside its box, filled with its edge, as readers of YOLO's labels do."""
    pixels_HW = in_box(mask["segmentation"], mask["bbox"])
    filled_HW = np.zeros(pixels_HW.shape, np.uint8)
    cv2.fillPoly(filled_HW, [(polygon_n2 - mask["bbox"][:2]).astype(np.int32)], 1)
    both = int(np.count_nonzero(filled_HW[pixels_HW]))
    either = int(np.count_nonzero(filled_HW | pixels_HW))
    return both / either
