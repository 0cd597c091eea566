"""How cost grows: with points, pixels, listed objects, and images, workers and shards of a run.

    python benchmarks/growth.py [--sections points pixels planning runs] [--objects 10000000] [--output FILE.md]

Each row is measured in a process of its own, whose peak memory it tells. Photographs are scikit-image's, enlarged
where they are to be larger. Weights are those that come along.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import skimage.data
import torch
from numpy.typing import NDArray
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from reporting import origin, table

from pipeline import manifest
from pipeline.amg import MaskGenerator
from pipeline.model import load_model
from pipeline.sources import ImageRef

POINTS: Final = (8, 16, 32, 64)
MEGAPIXELS: Final = (0.25, 1, 4, 16, 64, 144)
OBJECTS: Final = (10_000, 100_000, 1_000_000, 10_000_000)
RUNS: Final = (  # images, workers, images a shard
    (10, 1, 256),
    (100, 1, 256),
    (1000, 1, 256),
    (100, 2, 25),
    (100, 1, 1),
    (100, 1, 10),
)
HEADS: Final = {
    "points": ["points per side", "prompts", "masks", "s", "s a thousand prompts", "peak MiB"],
    "pixels": ["megapixels", "size", "masks", "s", "peak MiB", "MiB above the image's own"],
    "planning": ["objects", "s", "objects a second", "MiB above the start"],
    "runs": ["images", "workers", "images a shard", "shards", "s", "s in workers", "images a second", "bytes"],
}
_MIB: Final = 2**20


def main() -> None:
    """Measure, and print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", default=list(HEADS), choices=list(HEADS))
    parser.add_argument("--objects", type=int, default=OBJECTS[-1], help="of the longest listing")
    parser.add_argument("--images", type=int, default=RUNS[2][0], help="of the longest run")
    parser.add_argument("--output", help="file that receives the tables as Markdown")
    parser.add_argument("--row", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        section, *values = options.row
        print(json.dumps(_MEASURES[section](*map(float, values))))
        return
    text = origin(torch.device("cpu"))
    for section in options.sections:
        rows = [HEADS[section]]
        for values in _rows_of(section, options):
            rows.append(_in_a_process(section, values))
            print(f"{section}: {', '.join(rows[-1])}", file=sys.stderr, flush=True)
        text += f"\n## {section.capitalize()}\n\n{table(rows)}"
    print(text)
    if options.output:
        Path(options.output).write_text("# How cost grows\n\n" + text)


def _rows_of(section: str, options: argparse.Namespace) -> list[tuple[float, ...]]:
    match section:
        case "points":
            return [(side,) for side in POINTS]
        case "pixels":
            return [(megapixels,) for megapixels in MEGAPIXELS]
        case "planning":
            return [(objects,) for objects in OBJECTS if objects <= options.objects]
        case _:
            return [run for run in RUNS if run[0] <= options.images]


def _in_a_process(section: str, values: tuple[float, ...]) -> list[str]:
    command = [sys.executable, __file__, "--row", section, *map(str, values)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    row: list[str] = json.loads(done.stdout.splitlines()[-1])
    return row


def _points(side: float) -> list[str]:
    generator = MaskGenerator(load_model("demo", "cpu", image_size=1024), points_per_side=int(side))
    rgb = skimage.data.coffee()
    MaskGenerator(generator.model, points_per_side=2).generate(rgb)
    start = time.perf_counter()
    masks = generator.generate(rgb)
    seconds = time.perf_counter() - start
    prompts = int(side) ** 2
    return [
        f"{side:.0f}",
        str(prompts),
        str(len(masks)),
        f"{seconds:.2f}",
        f"{1000 * seconds / prompts:.2f}",
        f"{_peak():.0f}",
    ]


def _pixels(megapixels: float) -> list[str]:
    scale = (megapixels * 1e6 / (400 * 600)) ** 0.5
    height, width = round(400 * scale), round(600 * scale)
    rgb: NDArray[np.uint8] = np.array(Image.fromarray(skimage.data.coffee()).resize((width, height)))
    generator = MaskGenerator(load_model("demo", "cpu"), points_per_side=16)
    MaskGenerator(generator.model, points_per_side=2).generate(rgb[:100, :100])
    before = _peak()
    start = time.perf_counter()
    masks = generator.generate(rgb)
    seconds = time.perf_counter() - start
    return [
        f"{megapixels:g}",
        f"{width} x {height}",
        str(len(masks)),
        f"{seconds:.2f}",
        f"{_peak():.0f}",
        f"{_peak() - before:.0f}",
    ]


def _planning(objects: float) -> list[str]:
    def listing() -> Iterator[ImageRef]:
        for index in range(int(objects)):
            shuffled = index * 2_654_435_761 % 2**32  # listings come in an order that is not the manifest's
            uri = f"s3://bucket/{shuffled % 997:03d}/{shuffled:010d}.jpg"
            yield ImageRef(uri, 150_000, f"{index:032x}", None, None)

    before = _peak()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        manifest.write_manifest(listing(), Path(folder).as_uri(), images_per_shard=256)
        seconds = time.perf_counter() - start
    return [f"{objects:.0f}", f"{seconds:.1f}", f"{objects / seconds:.0f}", f"{_peak() - before:.0f}"]


def _runs(images: float, workers: float, images_per_shard: float) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        photographs = Path(folder) / "in"
        photographs.mkdir()
        coffee = skimage.data.coffee()
        for index in range(int(images)):
            top, left = index * 37 % 200, index * 53 % 300
            Image.fromarray(coffee[top : top + 200, left : left + 300]).save(photographs / f"{index:05d}.jpg")
        command = [sys.executable, "-m", "jobs.generate_masks", "--model", "demo", "--image-size", "256"]
        command += ["--images", str(photographs), "--output", f"{folder}/out", "--points-per-side", "8"]
        command += ["--num-workers", f"{workers:.0f}", "--images-per-shard", f"{images_per_shard:.0f}"]
        command += ["--device", "cpu", "--cpus-per-worker", "1"]
        subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parents[1])
        summary: dict[str, Any] = json.loads((Path(folder) / "out" / "summary.json").read_text())
    return [
        f"{images:.0f}",
        f"{workers:.0f}",
        f"{images_per_shard:.0f}",
        str(summary["shards"]),
        f"{summary['seconds']:.1f}",
        f"{summary['worker_seconds']:.1f}",
        f"{summary['images_per_second']:.2f}",
        str(summary["bytes"]),
    ]


_MEASURES: Final[dict[str, Callable[..., Any]]] = {
    "points": _points,
    "pixels": _pixels,
    "planning": _planning,
    "runs": _runs,
}


def _peak() -> float:
    """Of this process's resident memory so far, in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024 / _MIB


if __name__ == "__main__":
    main()
