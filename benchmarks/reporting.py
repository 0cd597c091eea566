"""What the benchmarks' tables have in common: where and of what they were measured, how masks are matched."""

import platform
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from pycocotools import mask as coco
from scipy.optimize import linear_sum_assignment

from pipeline.model.weights import UNUSED, read_checkpoint

Masks = list[dict[str, Any]]
Made = TypeVar("Made")
PARTNERS: Final = 0.5
"""IoU of two masks that can be partners."""


def origin(device: torch.device) -> str:
    """Device, versions, date and commit, as lines of a list."""
    root = Path(__file__).parents[1]
    git = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    return (
        f"* {device.type}: {name}{threads}; torch {torch.__version__}, Python {platform.python_version()}\n"
        f"* {datetime.now(UTC):%Y-%m-%d}, commit {commit}\n"
    )


def table(rows: list[list[str]]) -> str:
    """A Markdown table; the first row is its head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"


def photographs(folder: Path, limit: int | None = None) -> dict[str, NDArray[np.uint8]]:
    """The JPEG and PNG files of a folder by name, upright, H x W x 3 RGB."""
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in {".jpg", ".jpeg", ".png"})
    return {path.name: _read(path) for path in files[:limit]}


def _read(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))


def reference_weights(checkpoint: str) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors by name, with those that the package mobile_sam wants and never uses."""
    unused = {name: torch.zeros(shape) for name, shape in UNUSED.items()}
    return unused | dict(read_checkpoint(checkpoint).tensors)


def ious(masks: Masks, expected: Masks) -> NDArray[np.float64]:
    """Mask IoU of each with each; 1 for two empty masks."""
    if not (masks and expected):
        return np.zeros((len(masks), len(expected)))
    overlaps = coco.iou(
        [m["segmentation"] for m in masks], [m["segmentation"] for m in expected], [0] * len(expected)
    )
    both_empty = np.array([[m["area"] == 0] for m in masks]) & np.array([m["area"] == 0 for m in expected])
    paired: NDArray[np.float64] = np.where(both_empty, 1.0, overlaps)
    return paired


def partners(masks: Masks, expected: Masks) -> NDArray[np.float64]:
    """IoUs of masks matched one to one so that their sum is largest; below `PARTNERS` they are none."""
    overlaps = ious(masks, expected)
    pairs: NDArray[np.float64] = overlaps[linear_sum_assignment(-overlaps)]
    return pairs[pairs >= PARTNERS]


def timed(work: Callable[[], Made], device: torch.device) -> tuple[Made, float]:
    """What work returns, and its seconds: until the device, which had nothing else to do, is done with it."""
    _wait(device)
    start = time.perf_counter()
    made = work()
    _wait(device)
    return made, time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
