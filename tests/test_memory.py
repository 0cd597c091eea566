"""Memory: a huge image within a stated limit, and many images in one worker without growth."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

from running import TIMEOUT_S, rows

from pipeline import rle

GROWTH_IMAGES: Final = int(os.environ.get("EVERYMASK_GROWTH_IMAGES", "5000"))
"""Case 44 says 10,000, which take some minutes."""

SIDE: Final = 12_000
WORKER_LIMIT: Final = 2**32
DECODER_LIMIT: Final = 3 * 2**29


def python(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, in a process whose memory is its own."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=TIMEOUT_S)


HUGE: Final = """
import resource
import sys

import numpy as np
from PIL import Image

from pipeline import reconcile
from pipeline import run as runs
from pipeline.config import AmgConfig, ImagesConfig, MasksConfig
from pipeline.predict import content_of, weights_of
from pipeline.decoding import Decoders
from pipeline.model import load_model
from pipeline.shard import make_shard
from schemas.masks import MASKS_SCHEMA

folder, (side, worker, decoder) = sys.argv[1], map(int, sys.argv[2:])
picture = Image.new("RGB", (side, side))
picture.paste((200, 150, 20), (side // 6, side // 4, side // 2, side // 4 * 3))
picture.save(f"{folder}/in/huge.png", compress_level=1)
del picture
model = load_model("demo", "cpu")
config = MasksConfig(
    images=f"file://{folder}/in",
    output=f"file://{folder}/out",
    amg=AmgConfig(points_per_side=8, memory_budget=2**28),
    reading=ImagesConfig(decode_memory=decoder),
)
run = runs.open_run(config, weights_of(model))
content = content_of(config, model)
content.of_image(np.zeros((64, 64, 3), np.uint8))  # what it allocates once
with Decoders(config.reading) as decode:
    resource.setrlimit(resource.RLIMIT_DATA, (worker, resource.RLIM_INFINITY))
    make_shard(0, config, content, decode, run.provenance)
"""


def test_case_18_a_huge_image_within_a_stated_memory_budget(tmp_path: Path) -> None:
    """12,000 x 12,000 pixels, 192 candidates: 4 GiB for the worker, 1.5 GiB for its decoder, held by the kernel.

    Pillow's copies of the picture take 7 bytes a pixel in the worker and 4 in the decoder, the pixels 3 in both.
    """
    (tmp_path / "in").mkdir()
    done = python(HUGE, tmp_path, SIDE, WORKER_LIMIT, DECODER_LIMIT)
    assert done.returncode == 0, done.stderr
    [row] = rows(tmp_path / "out")
    assert (row["status"], row["error"], row["height"], row["width"]) == ("ok", None, SIDE, SIDE)
    assert row["masks"]
    for mask in row["masks"]:
        assert mask["segmentation"]["size"] == [SIDE, SIDE]
        assert rle.area(mask["segmentation"]) == mask["area"]


GROWTH: Final = """
import sys

import numpy as np
from PIL import Image

from pipeline import reconcile
from pipeline import run as runs
from pipeline.config import MasksConfig
from pipeline.contents import Content
from pipeline.config import LoadedWeights
from pipeline.decoding import Decoders
from pipeline.model.sam import THRESHOLDS
from pipeline.shard import make_shard
from schemas.masks import MASKS_SCHEMA

folder, count = sys.argv[1], int(sys.argv[2])
for index in range(count):
    pixels = np.full((64, 64, 3), index % 256, np.uint8)
    Image.fromarray(pixels).save(f"{folder}/in/{index:05d}.bmp")
images, output = f"file://{folder}/in", f"file://{folder}/out"
run = runs.open_run(
    MasksConfig(images=images, output=output, images_per_shard=count // 10),
    LoadedWeights("0" * 64, 64, "mobile_sam", THRESHOLDS),
)
content = Content(
    schema=MASKS_SCHEMA, rows_per_group=64, of_failure={"masks": []},
    of_image=lambda rgb_HW3: {"masks": [], "status": "empty"},
)


def resident():
    status = open("/proc/self/status").read()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) // 1024


with Decoders(run.config.reading) as decode:
    for shard in range(run.shards):
        make_shard(shard, run.config, content, decode, run.provenance)
        if shard == 2:
            before = resident()
print(reconcile.write_summary(run, "complete", {}, 1.0)["empty"], resident() - before)
"""


def test_case_44_memory_does_not_grow_with_images(tmp_path: Path) -> None:
    """Each is 12 KiB, and there is no model, which would hide the rest: the last 7 of 10 shards add nothing."""
    (tmp_path / "in").mkdir()
    done = python(GROWTH, tmp_path, GROWTH_IMAGES)
    assert done.returncode == 0, done.stderr
    images, growth_MiB = map(int, done.stdout.split())
    assert images == GROWTH_IMAGES
    assert growth_MiB < 0.7 * GROWTH_IMAGES * 3 * 64**2 / 2**20 / 2
