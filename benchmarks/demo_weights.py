"""Train, tune and measure the weights that come along, `--model demo`: the recipe of docs/model-card.md.

    python benchmarks/demo_weights.py --bsds BSDS500 --output FOLDER [--device cuda] [--minutes N] [--limit N]

Leaves in FOLDER: `trained-1-0.safetensors`, of the first round and its seed; on a CPU also those of further
rounds, each of which goes on from what came of the one before, and from the fourth on `averaged-4` and so on,
means of what a round's trainings began with and what they became ("Model soups", Wortsman et al. 2022);
`demo.safetensors` with thresholds and in float16; `demo.md` with what they reach. Started again after a kill, it
goes on from the last checkpoint. Needs no Ray.
"""

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Final, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from pipeline.model import load_model
from pipeline.model.weights import checkpoint_bytes

ROOT: Final = Path(__file__).parents[1]
EVERY_ROUND: Final = [
    *("--box-share", "0.05", "--optimizer", "muon", "--clip", "1", "--ema-decay", "0.995"),
]


class Round(NamedTuple):
    """Trainings that go on from what came of the round before, one a seed."""

    flags: str
    seeds: tuple[int, ...]
    share: float = 1.0
    """Of what they became, in the mean of that and what they began with, which is what comes of it."""


# A step of the last stage costs several times one of the first. From random weights the encoder learns grouping
# alone at first.
ROUNDS: Final = {
    "cpu": [
        Round(
            "--scenes 1 --stages 224:16:0.85 --stages 512:4:1 --warmup-steps 40 --grouping 1 --learning-rate 2e-3 "
            "--grouping-steps 1000",
            seeds=(0,),
        ),
        Round(
            "--scenes 1 --stages 224:16:0.85 --stages 512:4:1 --warmup-steps 40 --grouping 1 "
            "--learning-rate 1.5e-3",
            seeds=(2,),
        ),
        Round(
            "--scenes 1 --stages 224:16:0.5 --stages 320:8:0.8 --stages 512:4:1 --warmup-steps 40 --grouping 1 "
            "--learning-rate 1.5e-3",
            seeds=(3,),
        ),
        Round(
            "--scenes 1 --stages 224:16:0.3 --stages 320:8:0.6 --stages 512:4:1 --warmup-steps 40 --grouping 1 "
            "--learning-rate 1.5e-3",
            seeds=(4,),
            share=0.5,
        ),
        Round(
            "--scenes 2 --stages 256:16:0.2 --stages 384:8:0.5 --stages 512:4:1 --warmup-steps 40 --grouping 1 "
            "--learning-rate 1.2e-3",
            seeds=(5,),
            share=0.5,
        ),
        Round(
            "--scenes 3 --stages 256:16:0.2 --stages 384:8:0.5 --stages 512:4:1 --warmup-steps 40 --grouping 1 "
            "--learning-rate 1.2e-3",
            seeds=(6,),
            share=0.5,
        ),
        Round(
            "--scenes 9 --stages 384:8:0.4 --stages 512:4:1 --warmup-steps 40 --grouping 1 --learning-rate 1.2e-3",
            seeds=(7,),
            share=0.35,
        ),
        Round(
            "--scenes 9 --stages 384:8:0.4 --stages 512:4:1 --warmup-steps 40 --grouping 1 --learning-rate 1.2e-3",
            seeds=(8, 9),
            share=0.35,
        ),
        Round(
            "--scenes 4 --stages 384:8:0.4 --stages 512:4:1 --warmup-steps 40 --learning-rate 1.2e-3",
            seeds=(11,),
            share=0.35,
        ),
        Round(
            "--scenes 4 --stages 384:8:0.4 --stages 512:4:1 --warmup-steps 40 --learning-rate 4e-4",
            seeds=(12, 13),
        ),
        Round(
            "--scenes 1 --stages 384:8:0.4 --stages 512:4:1 --warmup-steps 40 --learning-rate 5e-4",
            seeds=(20, 21),
            share=0.5,
        ),
        Round(
            "--scenes 2 --stages 384:8:0.4 --stages 512:4:1 --warmup-steps 40 --learning-rate 5e-4",
            seeds=(22,),
            share=0.5,
        ),
    ],
    "cuda": [
        Round(
            "--scenes 1 --stages 224:64:0.75 --stages 512:32:1 --warmup-steps 100 --grouping 1 "
            "--learning-rate 2e-3 --grouping-steps 1500 --loaders 12",
            seeds=(0,),
        )
    ],
}
MINUTES: Final = {"cpu": 96.0, "cuda": 22.0}


def main() -> None:
    """Run the commands."""
    options = _options()
    options.output.mkdir(parents=True, exist_ok=True)
    demo, report = (options.output / name for name in ("demo.safetensors", "demo.md"))
    device = options.device
    minutes = options.minutes or MINUTES[device]
    trained: Path | None = None
    for number, (flags, seeds, share) in enumerate(ROUNDS[device], 1):
        before, became = trained, list[Path]()
        for seed in seeds:
            became.append(options.output / f"trained-{number}-{seed}.safetensors")
            if not became[-1].exists():
                common = ["--bsds", options.bsds, "--minutes", minutes, "--device", device, *EVERY_ROUND]
                begun: list[str | Path] = ["--checkpoint", before] if before else []
                _run("train_model", *common, *flags.split(), "--seed", seed, *begun, "--output", became[-1])
        trained = became[0]
        if before and (share < 1 or len(became) > 1):
            trained = options.output / f"averaged-{number}.safetensors"
            if not trained.exists():
                _average(before, became, share, trained)
    if not demo.exists():
        chosen = ["--checkpoint", trained, "--output", demo, "--dtype", "float16"]
        _run("tune_thresholds", *chosen, "--bsds", options.bsds, "--limit", 16, "--points-per-side", 16)
    measured = ["--checkpoint", demo, "--bsds", options.bsds, "--scenes", options.limit, "--limit", options.limit]
    _run("evaluate_model", *measured, "--points-per-side", 16, "--peers", "--device", device, "--output", report)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bsds", type=Path, required=True, help="folder of BSDS500")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", choices=MINUTES, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, help=f"of each training; by default {MINUTES}")
    parser.add_argument("--limit", type=int, default=100, help="val photographs, and scenes, to measure on")
    options = parser.parse_args()
    options.bsds, options.output = options.bsds.resolve(), options.output.resolve()
    return options


def _average(before: Path, became: list[Path], share: float, output: Path) -> None:
    model, *others = (load_model(str(path), "cpu") for path in (before, *became))
    states = [other.state_dict() for other in others]
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.lerp_(torch.stack([state[name] for state in states]).mean(0), share)
    output.write_bytes(checkpoint_bytes(model, {"image_size": model.image_size}))


def _run(job: str, *arguments: object) -> None:
    command = ["-m", f"jobs.{job}", *map(str, arguments)]
    print(f"+ python {shlex.join(command)}", file=sys.stderr, flush=True)
    start = time.monotonic()
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    print(f"+ {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
