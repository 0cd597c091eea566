"""Images a second into a training loop: a masks dataset beside the JSON files of SA-1B that it was imported from.

    python benchmarks/reading.py [--sa1b FOLDER] [--images 48] [--workers 0 1] [--output FILE.md]

Without a folder of SA-1B, one is made: scikit-image's photographs, shifted, with Felzenszwalb's segments as masks.
Both readers give the same: uint8 image, masks, boxes, scores, in shuffled order. JSON is read as is usual, by a
map-style dataset with Pillow, json and pycocotools.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
import torch
from PIL import Image
from pycocotools import mask as coco
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).parents[1]))

from reporting import origin, table

from jobs.import_sa1b import import_sa1b
from pipeline import rle
from pipeline.config import ImportConfig
from pipeline.evaluation import felzenszwalb
from pipeline.reading import MaskSamples

SIZE = (384, 576)
MASKS = 100  # of a picture, about as many as in SA-1B


class JsonFiles(Dataset[tuple[Any, ...]]):
    """SA-1B as it lies there."""

    def __init__(self, folder: Path, form: str) -> None:
        self._paths, self._form = sorted(folder.glob("*.json")), form

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        path = self._paths[index]
        annotations = json.loads(path.read_text())["annotations"]
        rgb_HW3 = np.array(Image.open(path.with_suffix(".jpg")).convert("RGB"))
        rles = [one["segmentation"] for one in annotations]
        masks = (
            torch.from_numpy(coco.decode(rles)).permute(2, 0, 1).contiguous().bool()
            if self._form == "bool"
            else rles
        )
        boxes = torch.tensor([one["bbox"] for one in annotations])
        scores = torch.tensor([one["predicted_iou"] for one in annotations])
        return torch.from_numpy(rgb_HW3).permute(2, 0, 1).contiguous(), masks, boxes, scores


def main() -> None:
    """Measure, and print or write a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sa1b", type=Path, help="folder with sa_*.jpg and sa_*.json")
    parser.add_argument("--images", type=int, default=48, help="how many to make, without --sa1b")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--repeat", type=int, default=3, help="passes; the fastest counts")
    parser.add_argument("--output", help="file that receives the table as Markdown")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.sa1b or made(Path(scratch) / "sa1b", options.images)
        output = str(Path(scratch) / "out")
        import_sa1b(config=ImportConfig(images=str(folder), output=output), processes=1)
        rows = [["masks as", "workers", "images/s JSON", "images/s everymask", "ratio"]]
        for form in ("bool", "rle"):
            for workers in options.workers:
                files = DataLoader(JsonFiles(folder, form), batch_size=None, shuffle=True, num_workers=workers)
                ours = DataLoader(MaskSamples(output, masks=form, seed=0), batch_size=None, num_workers=workers)
                best = [0.0, 0.0]
                for _ in range(options.repeat):  # one after the other, as the machine's mood changes
                    best = [
                        max(rate, images_per_second(loader))
                        for rate, loader in zip(best, (files, ours), strict=True)
                    ]
                rows.append([form, str(workers), *(f"{rate:.1f}" for rate in best), f"{best[1] / best[0]:.2f}"])
        text = origin(torch.device("cpu")) + described(folder, Path(output)) + f"\n{table(rows)}"
    print(text)
    if options.output:
        Path(options.output).write_text("# Reading masks into a training loop\n\n" + text)


def images_per_second(loader: Iterable[Any]) -> float:
    """Of one pass, with the start of its workers."""
    start, count = time.perf_counter(), sum(1 for _ in loader)
    return count / (time.perf_counter() - start)


def described(folder: Path, output: Path) -> str:
    """What is read, as lines of a list."""
    summary = json.loads((output / "summary.json").read_text())
    return (
        f"* {summary['images']} images of {folder.name}, {summary['masks'] / summary['images']:.0f} masks each\n"
        "* local disk, in the system's cache; the fastest of several passes, each with the start of its workers\n"
    )


def made(folder: Path, count: int) -> Path:
    """A folder laid out as SA-1B. No two pictures or masks are alike, or Parquet would store them once.

    They are still shifted ones of three, so the sizes of the files say nothing.
    """
    folder.mkdir()
    height, width = SIZE
    segmented = []
    for photograph in (skimage.data.coffee(), skimage.data.astronaut(), skimage.data.rocket()):
        rgb_HW3 = np.array(Image.fromarray(photograph).resize((width, height)))
        masks = felzenszwalb.proposals(felzenszwalb.partitions(rgb_HW3))[:MASKS]
        segmented.append((rgb_HW3, rle.decode_all(masks, SIZE)))
    for number in range(count):
        rgb_HW3, masks_NHW = segmented[number % len(segmented)]
        picture = folder / f"sa_{number}.jpg"
        Image.fromarray(np.roll(rgb_HW3, 5 * number, axis=1)).save(picture, quality=90)
        annotations = [annotation(rle.encode(mask_HW)) for mask_HW in np.roll(masks_NHW, 5 * number, axis=2)]
        image = {"image_id": number, "height": height, "width": width, "file_name": picture.name}
        picture.with_suffix(".json").write_text(json.dumps({"image": image, "annotations": annotations}))
    return folder


def annotation(mask: Any) -> dict[str, Any]:
    """As SA-1B has it."""
    x, y, width, height = coco.toBbox(mask).tolist()
    return {
        "segmentation": mask,
        "bbox": [x, y, width - 1, height - 1],
        "area": int(coco.area(mask)),
        "predicted_iou": 0.95,
        "point_coords": [[x, y]],
        "crop_box": [0, 0, SIZE[1], SIZE[0]],
        "stability_score": 0.97,
        "id": 1,
    }


if __name__ == "__main__":
    main()
