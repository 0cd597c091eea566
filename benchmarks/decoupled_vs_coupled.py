"""The MobileSAM paper's claim in small: a student distilled decoupled beside one distilled coupled.

    python benchmarks/decoupled_vs_coupled.py [--teacher demo] [--bsds FOLDER] [--output FILE.md]

Both students begin with the same random encoder under the teacher's own prompt encoder and mask decoder, and see
the same pictures in the same order. Decoupled: the encoder regresses the teacher's embeddings. Coupled: encoder
and decoder learn the teacher's masks, by SAM's own losses. Coupled is run twice: for as many pictures, and for as
much time. Measured is the mean IoU of the student's masks with the teacher's, on pictures that nobody saw: of the
mask that the student itself holds for the best, as in the paper, and of the best of its three.
"""

import argparse
import copy
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from reporting import origin

from pipeline.config import AmgConfig
from pipeline.evaluation import against_teacher
from pipeline.evaluation.pictures import PictureSet, bsds_pictures, scene_pictures
from pipeline.model import SamModel, load_model, pick_device
from pipeline.model.weights import published_tensors, seeded_model
from pipeline.training import bsds
from pipeline.training.config import OptimizerConfig
from pipeline.training.coupled import Coupled, Prompts, decode
from pipeline.training.decoupled import Distillation, Lessons, load_decoder
from pipeline.training.examples import Batch, Source, bsds_source, mixed, scene_source
from pipeline.training.loop import Training


@dataclass(frozen=True)
class Taught:
    """A picture and all that the teacher says of it, in the form that training takes."""

    name: str
    pixels_3SS: torch.Tensor
    embedding_CGG: torch.Tensor
    points_P2: torch.Tensor
    masks_Pss: torch.Tensor


class Result(NamedTuple):
    """What became of one student."""

    chosen: float
    """Mean IoU of the masks that it holds for the best with the teacher's."""
    best: float
    """The same of the best of its three."""
    pictures: int
    seconds: float


def main() -> None:
    """Train, measure, print and write the table."""
    options = _options()
    device = pick_device(options.device)
    teacher = load_model(options.teacher, device, "fp32", options.image_size)
    lessons = [_taught(teacher, name, rgb_HW3, options) for name, rgb_HW3 in _pictures(options)]
    held_out = _held_out(options)
    rows = []
    for seed in range(options.seeds):
        beginning = seeded_model(1000 + seed, options.image_size)
        load_decoder(beginning, {name: t.cpu() for name, t in published_tensors(teacher).items()}, "the teacher")
        results = {"untrained": Result(*_miou(beginning.to(device), teacher, held_out), 0, 0.0)}
        decoupled = _trained(beginning, lessons, seed, options, options.steps, coupled=False)
        coupled = _trained(beginning, lessons, seed, options, options.steps, coupled=True)
        affordable = round(options.steps * decoupled.position.seconds / coupled.position.seconds)
        runs = {
            "decoupled": decoupled,
            "coupled, equal pictures": coupled,
            "coupled, equal time": _trained(beginning, lessons, seed, options, affordable, coupled=True),
        }
        for name, training in runs.items():
            student = _averaged(training, options.image_size).to(device)
            pictures = training.position.step * options.batch
            results[name] = Result(*_miou(student, teacher, held_out), pictures, training.position.seconds)
        for name, result in results.items():
            print(f"seed {seed}, {name}: {result}", file=sys.stderr, flush=True)
        rows.append(results)
    text = _report(rows, options, device)
    print(text)
    if options.output:
        Path(options.output).write_text(text)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="demo", help="name or checkpoint of the teacher")
    parser.add_argument("--bsds", type=Path, help="folder of BSDS500: half of the pictures are its photographs")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--pictures", type=int, default=400, help="that are trained on")
    parser.add_argument("--held-out", type=int, default=40, help="pictures that are measured on")
    parser.add_argument("--prompts", type=int, default=8, help="a picture, for coupled training")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", help="file that receives the table as Markdown")
    return parser.parse_args()


def _pictures(options: argparse.Namespace) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """Names and pictures to train on; nobody's masks are used."""
    sources: list[Source] = [scene_source(256, 0)]
    if options.bsds:
        photographs = [bsds.read_photograph(path) for path in bsds.photographs(options.bsds, "train")]
        sources.append(bsds_source(photographs))
    draw = mixed(sources, [1] * len(sources))
    rng = np.random.default_rng(0)
    for index in range(options.pictures):
        yield f"picture {index}", _square(draw(rng).rgb_HW3, options.image_size, rng)


def _square(rgb_HW3: NDArray[np.uint8], size: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """A square piece of a picture, at least half as large as it can be, so that nothing is padding."""
    side = int(min(rgb_HW3.shape[:2]) * rng.uniform(0.5, 1))
    y, x = (int(rng.integers(0, length - side + 1)) for length in rgb_HW3.shape[:2])
    piece = Image.fromarray(rgb_HW3[y : y + side, x : x + side])
    return np.array(piece.resize((size, size), Image.Resampling.BILINEAR))


def _held_out(options: argparse.Namespace) -> PictureSet:
    if options.bsds:
        return bsds_pictures(options.bsds, "val", options.held_out)
    return scene_pictures(options.held_out, 256)


@torch.inference_mode()
def _taught(teacher: SamModel, name: str, rgb_HW3: NDArray[np.uint8], options: argparse.Namespace) -> Taught:
    """The teacher's embedding, and its best mask for each of some random clicks."""
    embedding = teacher.encode(rgb_HW3)
    rng = np.random.default_rng([1, *name.encode()])
    size = options.image_size
    points = torch.from_numpy(rng.uniform(0, size, (1, options.prompts, 1, 2))).float().to(teacher.device)
    labels = torch.ones(points.shape[:3], dtype=torch.int64, device=teacher.device)
    logits, iou = decode(teacher, embedding.features_1CHW, Prompts(points, labels, None, None))
    best = logits[0, torch.arange(options.prompts), iou[0].argmax(dim=1)]
    return Taught(
        name,
        torch.from_numpy(np.ascontiguousarray(rgb_HW3.transpose(2, 0, 1))),
        embedding.features_1CHW[0].half().cpu(),
        points[0, :, 0].cpu(),
        ((best > 0) * 255).to(torch.uint8).cpu(),
    )


def _batches(lessons: list[Taught], seed: int, options: argparse.Namespace, *, coupled: bool) -> Iterator[Any]:
    """The same pictures in the same order for both."""
    number = 0
    while True:
        rng = np.random.default_rng([seed, number])
        chosen = [lessons[i] for i in rng.choice(len(lessons), options.batch, replace=False)]
        names = tuple(lesson.name for lesson in chosen)
        pixels = torch.stack([lesson.pixels_3SS for lesson in chosen])
        if coupled:
            prompts = options.prompts
            yield Batch(
                names,
                pixels,
                torch.stack([lesson.masks_Pss for lesson in chosen]),
                torch.arange(prompts).expand(len(chosen), prompts),
                torch.stack([lesson.points_P2 for lesson in chosen]),
                torch.zeros(len(chosen), prompts, 4),
            )
        else:
            sizes = torch.full((len(chosen), 2), options.image_size)
            yield Lessons(names, pixels, sizes, torch.stack([lesson.embedding_CGG for lesson in chosen]))
        number += 1


def _trained(
    beginning: SamModel,
    lessons: list[Taught],
    seed: int,
    options: argparse.Namespace,
    steps: int,
    *,
    coupled: bool,
) -> Training:
    model = copy.deepcopy(beginning).to(pick_device(options.device))
    config = OptimizerConfig(
        steps=steps,
        learning_rate=options.learning_rate,
        warmup_steps=steps // 10,
        ema_decay=0.98,
        precision=options.precision,
    )
    training = Training(Coupled(model) if coupled else Distillation(model), model, config)
    training.run(_batches(lessons, seed, options, coupled=coupled), 1.0)
    return training


def _averaged(training: Training, image_size: int) -> SamModel:
    model = SamModel("mobile_sam", image_size, "fp32")
    model.load_state_dict(training.average)
    return model.eval()


def _miou(student: SamModel, teacher: SamModel, pictures: PictureSet) -> tuple[float, float]:
    """Of one click each on a grid of 8 x 8, over all pictures: the student's choice, and the best of three."""
    config = AmgConfig(points_per_side=8)
    scores = against_teacher.measure({"student": student.eval()}, teacher, pictures, 8, config)["student"]
    agreements = [score.agreement for score in scores]
    chosen, best = (
        float(np.concatenate([getattr(one, name)[one.points_N == 1] for one in agreements]).mean())
        for name in ("chosen_N", "best_N")
    )
    return chosen, best


def _report(rows: list[dict[str, Result]], options: argparse.Namespace, device: torch.device) -> str:
    shown = {key: value for key, value in vars(options).items() if key not in {"output", "bsds", "device"}}
    lines = [
        "# Decoupled and coupled distillation",
        "",
        *origin(device).splitlines(),
        f"* command: `python benchmarks/decoupled_vs_coupled.py {shlex.join(sys.argv[1:])}`",
        f"* {', '.join(f'{key} {value}' for key, value in shown.items())}, "
        f"{'BSDS500 and scenes' if options.bsds else 'scenes'}",
        "",
        "| student | mIoU with the teacher's masks, each seed | mean | best of three, mean | pictures | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows[0]:
        chosen, best, pictures, seconds = zip(*(seed[row] for seed in rows), strict=True)
        lines.append(
            f"| {row} | {', '.join(f'{value:.3f}' for value in chosen)} | {np.mean(chosen):.3f} | "
            f"{np.mean(best):.3f} | {np.mean(pictures):.0f} | {np.mean(seconds):.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    start = time.monotonic()
    main()
    print(f"{time.monotonic() - start:.0f} s", file=sys.stderr)
