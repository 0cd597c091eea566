"""Everything in a photograph by other models: FastSAM's everything mode, and SAM's ViTs through this pipeline.

    pip install ultralytics
    python benchmarks/peers.py [PHOTOGRAPH ...] [--models mobile_sam vit_b vit_h fastsam] [--output FILE.md]

Without photographs, scikit-image's cup of coffee. All weights are random, from one seed, and the encoder's input
is 1024 pixels for all. Of SAM's models the grid is 32 x 32 and the same share of masks is confident; random masks
are near duplicates of each other, so that few stay. FastSAM is YOLOv8x-seg with one class, as ultralytics builds
and runs it. The fastest of some rounds counts, and the models take turns in each round.

The paper's times (arXiv 2306.14289, one GPU) are for the encoder and the masks of one prompt: 456 ms with ViT-H,
64 ms with FastSAM, 12 ms with MobileSAM.
"""

import argparse
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import skimage.data
import torch
from numpy.typing import NDArray
from PIL import Image
from segment_anything.utils.amg import build_point_grid

sys.path.insert(0, str(Path(__file__).parents[1]))

from reporting import origin, table, timed

from pipeline.amg import MaskGenerator
from pipeline.model import pick_device
from pipeline.model.sam import Architecture
from pipeline.model.weights import seeded_model

Rgb = NDArray[np.uint8]
SIZE: Final = 1024
PAPER_MS: Final = {"mobile_sam": 12, "fastsam": 64, "vit_h": 456}


def main() -> None:
    """Measure, and print or write a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", nargs="*", type=Path)
    parser.add_argument("--models", nargs="+", default=["mobile_sam", "vit_b", "vit_h", "fastsam"])
    parser.add_argument("--confident", type=float, default=0.25, help="share of masks above pred_iou_thresh")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", help="file that receives the table as Markdown")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    device = pick_device(options.device)
    pictures: dict[str, Rgb] = {
        path.name: np.array(Image.open(path).convert("RGB")) for path in options.photographs
    } or {"coffee": skimage.data.coffee()}
    rows = [
        [
            "photograph",
            "model",
            "parameters",
            "encoder or network, s",
            "everything, s",
            "ratio",
            "paper, one prompt",
        ]
    ]
    for name, rgb in pictures.items():
        makers = {model: _maker(model, device, options.confident, rgb) for model in options.models}
        best = dict.fromkeys(makers, (float("inf"), float("inf")))
        for _ in range(options.rounds):
            for model, (_, everything) in makers.items():
                best[model] = cast(tuple[float, float], tuple(map(min, best[model], everything())))
        ours = best[options.models[0]][1]
        for model, (parameters, _) in makers.items():
            encoder, whole = best[model]
            paper = f"{PAPER_MS[model] / PAPER_MS['mobile_sam']:.1f}" if model in PAPER_MS else ""
            rows.append(
                [
                    name,
                    model,
                    f"{parameters / 1e6:.1f} M",
                    f"{encoder:.2f}",
                    f"{whole:.2f}",
                    f"{whole / ours:.2f}",
                    paper,
                ]
            )
    text = f"{origin(device)}* random weights, {SIZE} pixels, fastest of {options.rounds} rounds\n\n{table(rows)}"
    print(text)
    if options.output:
        Path(options.output).write_text("# Everything in a photograph, by other models\n\n" + text)


def _maker(
    name: str, device: torch.device, confident: float, rgb_HW3: Rgb
) -> tuple[int, Callable[[], tuple[float, float]]]:
    """Number of parameters, and what returns seconds of the encoder and of all."""
    if name == "fastsam":
        return _fastsam(device, rgb_HW3)
    model = seeded_model(0, SIZE, cast(Architecture, name)).to(device)
    ious = model.predict(model.prepare(model.encode(rgb_HW3)), build_point_grid(8) * rgb_HW3.shape[1::-1]).iou_N3
    threshold = float(ious.flatten().quantile(1 - confident))
    generator = MaskGenerator(model, pred_iou_thresh=threshold, stability_score_thresh=0.0)

    def everything() -> tuple[float, float]:
        _, encoder = timed(partial(model.encode, rgb_HW3), device)
        _, whole = timed(partial(generator.generate, rgb_HW3), device)
        return encoder, whole

    return sum(parameter.numel() for parameter in model.parameters()), everything


def _fastsam(device: torch.device, rgb_HW3: Rgb) -> tuple[int, Callable[[], tuple[float, float]]]:
    from ultralytics.models.fastsam import FastSAMPredictor  # noqa: PLC0415 (not installed where it is not asked for)
    from ultralytics.nn.tasks import SegmentationModel  # noqa: PLC0415

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network: Any = SegmentationModel("yolov8x-seg.yaml", nc=1, verbose=False).eval()
    # Random weights are sure of nothing: every box is a candidate, and as many stay as may.
    settings = {
        "imgsz": SIZE,
        "conf": 1e-6,
        "iou": 0.9,
        "retina_masks": True,
        "device": str(device),
        "mode": "predict",
    }
    predictor = FastSAMPredictor(overrides=settings | {"verbose": False, "save": False})
    predictor.setup_model(network, verbose=False)
    bgr_HW3 = np.ascontiguousarray(rgb_HW3[:, :, ::-1])

    def everything() -> tuple[float, float]:
        [result] = predictor(bgr_HW3)
        _, whole = timed(partial(predictor, bgr_HW3), device)
        return result.speed["inference"] / 1e3, whole

    return sum(parameter.numel() for parameter in network.parameters()), everything


if __name__ == "__main__":
    main()
