"""How much of the device's speed a worker keeps: from a bucket to Parquet beside masks alone.

    python benchmarks/worker.py [--images FOLDER] [--limit 40] [--points-per-side 32] [--output FILE.md]

The bucket is a real S3 server on this machine, which takes some of it. Masks alone are `MaskGenerator.generate` of
images that are in memory, decoded. A worker is `make_shard`, as Ray's actors run it: fetching, decoding, masks,
RLE, writing, one shard after another. The two take turns, and the fastest round of each counts.
"""

import argparse
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Final

sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in (".", "tests")]

from reporting import origin, table, timed  # noqa: E402
from running import jpeg  # noqa: E402
from s3server import run_s3_server  # noqa: E402

from pipeline import run as runs  # noqa: E402
from pipeline.amg import MaskGenerator  # noqa: E402
from pipeline.config import AmgConfig, MasksConfig, ModelConfig  # noqa: E402
from pipeline.decoding import Decoders  # noqa: E402
from pipeline.images import decode_image  # noqa: E402
from pipeline.model import load_model, pick_device  # noqa: E402
from pipeline.predict import content_of, weights_of  # noqa: E402
from pipeline.shard import make_shard  # noqa: E402

PIECE: Final = (321, 481)
"""Height and width of the pieces of photographs that are taken without a folder."""


def main() -> None:
    """Measure, and print or write a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of JPEG files")
    parser.add_argument("--limit", type=int, default=40, help="images at most")
    parser.add_argument("--images-per-shard", type=int, default=10)
    parser.add_argument("--checkpoint", default="demo")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--points-per-side", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", help="file that receives the table as Markdown")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    device = pick_device(options.device)
    files = sorted(options.images.rglob("*.jpg"))[: options.limit] if options.images else []
    pictures = [path.read_bytes() for path in files] or [jpeg(i, PIECE) for i in range(options.limit)]
    decoded = [decode_image(data, max_pixels=10**9) for data in pictures]
    amg = AmgConfig(points_per_side=options.points_per_side)
    model = load_model(options.checkpoint, device)
    generator = MaskGenerator(model, points_per_side=options.points_per_side)
    generator.generate(decoded[0])
    alone, worker = [], []
    with tempfile.TemporaryDirectory() as folder, run_s3_server(Path(folder)) as server:
        os.environ |= server.environment
        bucket = server.make_bucket()
        for index, data in enumerate(pictures):
            server.put(f"{bucket}/in/{index:05d}.jpg", data)
        for number in range(options.rounds):
            _, seconds = timed(lambda: [generator.generate(rgb) for rgb in decoded], device)
            alone.append(seconds)
            config = MasksConfig(
                images=f"{bucket}/in",
                output=f"{bucket}/out-{number}",
                images_per_shard=options.images_per_shard,
                model=ModelConfig(model="demo"),
                amg=amg,
            )
            run = runs.open_run(config, weights_of(model))
            content = content_of(config, model)
            with Decoders(config.reading) as decode:
                decode(pictures[0])
                start = time.perf_counter()
                made = [make_shard(shard, config, content, decode, run.provenance) for shard in range(run.shards)]
                worker.append(time.perf_counter() - start)
            assert sum(shard.images for shard in made) == len(pictures)
    best = min(alone), min(worker)
    rows = [["", "images/s", "of masks alone"]]
    for name, seconds in zip(("masks alone", "bucket to Parquet"), best, strict=True):
        rows.append([name, f"{len(pictures) / seconds:.3f}", f"{100 * best[0] / seconds:.1f} %"])
    text = f"{origin(device)}* {len(pictures)} images, {options.points_per_side} points per side, weights "
    text += f"{options.checkpoint}, image size {model.image_size}\n\n{table(rows)}"
    print(text)
    if options.output:
        Path(options.output).write_text("# A worker beside masks alone\n\n" + text)


if __name__ == "__main__":
    main()
