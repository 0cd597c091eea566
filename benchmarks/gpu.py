"""Right first, then fast: one device's decoder against a float64 reference, its stages, its images a second.

    python benchmarks/gpu.py [--images FOLDER] [--checkpoint demo] [--device cuda] [--output FILE.md]

1. Mask logits and predicted IoUs of fresh random embeddings and prompts, beside segment_anything's decoder in
   float64, as a relative norm. What is to be written is NaN before. The exit code is 1, and nothing is timed,
   where float32 is off by more than 1e-5, or bfloat16 by more than 0.03. bfloat16 is plain PyTorch's, and that
   of the Triton kernels where this device is faster with them.
2. Seconds of the stages of one photograph: medians, by the device's own events.
3. Photographs through RLE, ours and the package mobile_sam, taking turns: medians of the rounds, images a second,
   peak memory, and how near the arithmetic's floor of 3.7 ms on an H100 is. Ours are encoded as many at a time as
   by a worker.

Without photographs, some of scikit-image's.
"""

import argparse
import copy
import logging
import statistics
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import skimage.data
import torch
from numpy.typing import NDArray
from segment_anything.utils.amg import build_point_grid

sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in (".", "tests")]

from reporting import origin, photographs, reference_weights, table, timed  # noqa: E402
from seeded import ReferenceGenerator, reference_with  # noqa: E402

from pipeline.amg import MaskGenerator  # noqa: E402
from pipeline.model import SamModel, load_model, pick_device  # noqa: E402
from pipeline.model.fused import FusedDecoder  # noqa: E402
from pipeline.model.sam import Precision  # noqa: E402

Rgb = NDArray[np.uint8]
LARGEST_ERROR: Final[dict[Precision, float]] = {"fp32": 1e-5, "bf16": 0.03}
FLOOR_MS: Final = 3.7
"""Of an image's arithmetic on an H100, with the work taken out that all prompts share."""


def main() -> None:
    """Check, measure, and print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of photographs")
    parser.add_argument("--checkpoint", default="demo")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--image-size", type=int, default=1024)
    parser.add_argument("--points-per-side", type=int, default=32)
    parser.add_argument("--limit", type=int, default=16, help="photographs at most")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", help="file that receives the tables as Markdown")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.backends.cudnn.allow_tf32 = False
    device = pick_device(options.device)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    models = _models(options, device)
    text = f"{origin(device)}* weights {options.checkpoint}, image size {options.image_size}, "
    text += f"{options.points_per_side} points per side\n\n"

    errors = {name: _errors(model) for name, model in models.items()}
    text += table(
        [["", "error of logits", "of predicted IoUs"]]
        + [[name, *(f"{error:.1e}" for error in found)] for name, found in errors.items()]
    )
    if any(not max(found) <= LARGEST_ERROR[models[name].precision] for name, found in errors.items()):  # NaN too
        sys.exit(f"{text}\nwrong answers: not timed")

    pictures = _photographs(options.images)[: options.limit]
    points = build_point_grid(options.points_per_side)
    text += "\n" + table(_stages(models, pictures[0], points, device, options.rounds))
    stock = reference_with(reference_weights(options.checkpoint), options.image_size)
    thresholds = models["fp32"].thresholds
    reference = ReferenceGenerator(
        stock.to(device), points_per_side=options.points_per_side, points_per_batch=64, **thresholds
    )
    generators: dict[str, Callable[[list[Rgb]], list[int]]] = {
        "mobile_sam, fp32": lambda photographs: [len(reference.generate(rgb)) for rgb in photographs]
    }
    for name, model in models.items():
        ours = MaskGenerator(model, points_per_side=options.points_per_side)
        generators[f"everymask, {name}"] = partial(_counts, ours)
    text += "\n" + table(_throughput(generators, pictures, device, options.rounds))
    print(text)
    if options.output:
        Path(options.output).write_text("# On one GPU\n\n" + text)


def _models(options: argparse.Namespace, device: torch.device) -> dict[str, SamModel]:
    def load(precision: Precision, *, kernels: bool) -> SamModel:
        return load_model(options.checkpoint, device, precision, options.image_size, kernels=kernels)

    models = {"fp32": load("fp32", kernels=False), "bf16": load("bf16", kernels=False)}
    with_kernels = load("bf16", kernels=True)
    if with_kernels.decoder_class is FusedDecoder:
        models["bf16, kernels"] = with_kernels
    return models


def _errors(model: SamModel) -> tuple[float, float]:
    """Relative norms of the difference from the float64 decoder: of mask logits, of predicted IoUs."""
    side, count = model.image_size // 16, 16
    features = torch.randn(1, 256, side, side, device=model.device) * 0.5
    points = torch.rand(count, 1, 2, device=model.device) * model.image_size
    with torch.inference_mode():
        encoder = model.prompt_encoder
        dense, positions = encoder.no_mask_embed.weight.view(1, -1, 1, 1), encoder.get_dense_pe()
        sparse, _ = encoder((points, torch.ones(count, 1, device=model.device)), None, None)
        exact = copy.deepcopy(model.mask_decoder).double()
        expected, expected_iou = exact.predict_masks(
            features.double(), positions.double(), sparse.double(), dense.double().expand(count, -1, side, side)
        )
        tables = model.fast_decoder.image(features, dense, positions)
        own = model.mask_decoder
        output = torch.cat([own.iou_token.weight, own.mask_tokens.weight]).expand(count, -1, -1)
        hidden, states = model.fast_decoder.run(tables, torch.cat([output, sparse], 1), count)
        weights = [head(hidden[:, 1 + i]) for i, head in enumerate(own.output_hypernetworks_mlps)]
        logits = torch.full((count, 4, model.mask_size, model.mask_size), torch.nan, device=model.device)
        model.fast_decoder.upscale(tables, states[0], torch.stack(weights, 1), logits)
        iou = own.iou_prediction_head(hidden[:, 0])
    return tuple(  # type: ignore[return-value]
        float((found - right).norm() / right.norm())
        for found, right in ((logits.double(), expected), (iou.double(), expected_iou))
    )


def _stages(
    models: dict[str, SamModel], rgb: Rgb, points_N2: NDArray[np.float64], device: torch.device, rounds: int
) -> list[list[str]]:
    rows = [["", "encoder, ms", "tables", "to the predicted IoU", "upscaling of a tenth"]]
    for name, model in models.items():
        embedding = model.encode(rgb)
        image = model.prepare(embedding)
        prompts = points_N2 * rgb.shape[1::-1]
        predictions = model.predict(image, prompts)
        wanted = predictions.iou_N3 >= predictions.iou_N3.flatten().quantile(0.9)
        stages: list[Callable[[], Any]] = [
            partial(model.encode, rgb),
            partial(model.prepare, embedding),
            partial(model.predict, image, prompts),
            partial(model.upscale, predictions, wanted),
        ]
        rows.append([name, *(f"{_median_ms(stage, device, rounds):.2f}" for stage in stages)])
    return rows


def _throughput(
    generators: dict[str, Callable[[list[Rgb]], list[int]]],
    photographs: list[Rgb],
    device: torch.device,
    rounds: int,
) -> list[list[str]]:
    rows = [["", "ms an image", "ratio", "images/s", "masks", "peak MiB", "% of the floor"]]
    times: dict[str, list[float]] = {name: [] for name in generators}
    peaks, masks = dict.fromkeys(generators, 0), dict.fromkeys(generators, 0)
    for number in range(rounds + 1):
        for name, generate in generators.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            made, seconds = timed(partial(generate, photographs), device)
            if number:  # the first one warms up
                times[name].append(seconds / len(photographs))
            masks[name] = sum(made)
            peaks[name] = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    first = statistics.median(next(iter(times.values())))
    for name, measured in times.items():
        each = statistics.median(measured)
        floor = f"{100 * FLOOR_MS / 1e3 / each:.1f}"
        rows.append(
            [name, f"{1e3 * each:.1f}", f"{first / each:.1f}", f"{1 / each:.2f}", str(masks[name])]
            + ([f"{peaks[name] / 2**20:.0f}", floor] if device.type == "cuda" else ["", ""])
        )
    return rows


def _counts(generator: MaskGenerator, photographs: list[Rgb]) -> list[int]:
    """Masks of each photograph."""
    counts = []
    for images in _batches(photographs, generator.model.images_per_batch):
        embeddings = generator.model.encode_batch(images)
        counts += [len(generator.generate(*pair)) for pair in zip(images, embeddings, strict=True)]
    return counts


def _batches(photographs: list[Rgb], count: int) -> list[list[Rgb]]:
    """So many in each, fewer in the last."""
    return [photographs[i : i + count] for i in range(0, len(photographs), count)]


def _median_ms(stage: Callable[[], Any], device: torch.device, rounds: int) -> float:
    stage()
    measured: list[float] = []
    for _ in range(rounds):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            stage()
            end.record()
            torch.cuda.synchronize(device)
            measured.append(start.elapsed_time(end))
        else:
            measured.append(1e3 * timed(stage, device)[1])
    return statistics.median(measured)


def _photographs(folder: Path | None) -> list[Rgb]:
    if folder is None:
        return [skimage.data.coffee(), skimage.data.astronaut(), skimage.data.rocket(), skimage.data.chelsea()]
    return list(photographs(folder).values())


if __name__ == "__main__":
    main()
