"""Memory: a huge image within a stated limit, and many images in one worker without growth."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

GROWTH_IMAGES: Final = int(os.environ.get("EVERYMASK_GROWTH_IMAGES", "1500"))
"""Case 44 says 10,000, which take some minutes."""

SIDE: Final = 12_000
WORKER_LIMIT: Final = 3 * 2**29
DECODER_LIMIT: Final = 2**30

HUGE: Final = """
import resource
import sys

import numpy as np
from PIL import Image

from pipeline import run as runs
from pipeline.config import AmgConfig, ImagesConfig, MasksConfig
from pipeline.contents import content_of, weights_of
from pipeline.decoding import Decoders
from pipeline.model import load_model
from pipeline.shard import make_shard

folder, checkpoint, side, worker, decoder = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
picture = Image.new("RGB", (side, side))
picture.paste((200, 150, 20), (side // 6, side // 4, side // 2, side // 4 * 3))
picture.save(f"{folder}/in/huge.png", compress_level=1)
del picture
config = MasksConfig(
    images=f"file://{folder}/in",
    output=f"file://{folder}/out",
    amg=AmgConfig(points_per_side=8, pred_iou_thresh=-10, stability_score_thresh=0, box_nms_thresh=0.01, memory_budget=2**28),
    reading=ImagesConfig(decode_memory=decoder),
)
model = load_model(checkpoint)
run = runs.open_run(config, weights_of(model))
content = content_of(config, model)
content.of_image(np.zeros((64, 64, 3), np.uint8))  # what it allocates once
with Decoders(config.reading) as decode:
    resource.setrlimit(resource.RLIMIT_DATA, (worker, resource.RLIM_INFINITY))
    make_shard(0, config, content, decode, run.provenance)
status = open("/proc/self/status").read()
print([line for line in status.splitlines() if line.startswith(("VmHWM", "VmData", "VmPeak"))])
"""
