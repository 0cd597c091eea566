"""What a run on many machines would take: simulated, from what a worker takes here.

    python benchmarks/simulate_cluster.py --measure measured.json
    python benchmarks/simulate_cluster.py --measured measured.json [--image-seconds 0.05] [--price 2.0]
        [--sections scale reclaims sizes depth skew] [--output FILE.md]
    python benchmarks/simulate_cluster.py --compare

`--measure` makes a shard of photographs' pieces as a worker does, alone and with a second one beside it, and notes
the seconds of each image. `--image-seconds` puts another device in the place of this one: an assumption, which the
tables name. `--compare` measures, simulates runs of 1 and 2 workers, makes them, and tells how far off it was. All
runs have the same images, the demo weights and 8 points per side, unless the flags say otherwise.
"""

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

import torch

ROOT: Final = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from cluster_model import SHARDS_AT_ONCE, Cluster, Measured, Outcome, Store, simulate  # noqa: E402
from measured_worker import at_once, measure, write_pictures  # noqa: E402
from reporting import origin, table  # noqa: E402

SIZES: Final = {"SA-1B, 11 million": 11_000_000, "one billion": 1_000_000_000}
WORKERS: Final = (1, 10, 100, 1000)
S3_READS: Final = 5500.0
"""Requests a second for one prefix, as S3's documentation has it."""
SECTIONS: Final = ("scale", "reclaims", "sizes", "depth", "skew")


def main() -> None:
    """Measure, compare, or simulate and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", type=Path, metavar="FILE", help="measure a worker here and write it")
    parser.add_argument("--measured", type=Path, metavar="FILE", help="what --measure wrote")
    parser.add_argument("--compare", action="store_true", help="with real runs of 1 and 2 workers here")
    parser.add_argument("--sections", nargs="+", default=SECTIONS, choices=SECTIONS)
    parser.add_argument("--images", type=int, default=96, help="of the measured shard; a run has twice as many")
    parser.add_argument("--points-per-side", type=int, default=8)
    parser.add_argument("--image-seconds", type=float, help="ASSUMED seconds of the device for an image")
    parser.add_argument("--price", type=float, help="of a machine's hour, in any currency")
    parser.add_argument("--reclaims", type=float, default=0.05, help="ASSUMED, of a machine in an hour")
    parser.add_argument("--startup", type=float, default=60.0, help="ASSUMED seconds until a worker is up")
    parser.add_argument("--latency", type=float, default=0.1, help="ASSUMED seconds of a request to the store")
    parser.add_argument("--gigabits", type=float, default=100.0, help="ASSUMED, a second from the store, to all")
    parser.add_argument("--image-kilobytes", type=float, default=500.0, help="ASSUMED, of an image's file")
    parser.add_argument("--output", help="file that receives the tables as Markdown")
    options = parser.parse_args()
    if options.measure:
        options.measure.write_text(json.dumps(measure(options.images, options.points_per_side)))
    elif options.compare:
        _tell(f"# Simulated beside real\n\n{origin(torch.device('cpu'))}\n{_compare(options)}", options.output)
    elif options.measured:
        _tell(_tables(options), options.output)
    else:
        parser.error("one of --measure, --measured, --compare")


def _tell(text: str, output: str | None) -> None:
    print(text)
    if output:
        Path(output).write_text(text)


# Beside real runs


def _compare(options: argparse.Namespace) -> str:
    rows = [["workers", "images", "images/s simulated", "real", "off by", "seconds simulated", "real", "off by"]]
    images = 2 * options.images
    with tempfile.TemporaryDirectory() as folder:
        measured = Path(folder, "measured")
        write_pictures(measured, options.images)
        write_pictures(Path(folder, "in"), images)
        for workers in (1, 2):
            write_pictures(Path(folder, f"start-{workers}"), workers)
            before = at_once(measured, options.points_per_side, workers)
            start = _run(options, Path(folder, f"start-{workers}"), Path(folder, f"s-{workers}"), workers, 1)
            per_shard = images // 16
            output = Path(folder, f"out-{workers}")
            real = _run(options, Path(folder, "in"), output, workers, per_shard)
            # Before and after: a rented machine is not as fast in one minute as in the next.
            one = _both(before, at_once(measured, options.points_per_side, workers))
            # Ray's start and a worker's: what a run of an image a worker takes, but for the image.
            overhead = start["seconds"] - sum(one.make) / len(one.make) - one.plan - one.write
            cluster = Cluster(
                images=images,
                workers=workers,
                images_per_shard=per_shard,
                driver_seconds=overhead,
            )
            predicted = simulate(cluster, one)
            # Without the start, which is not the same twice: from the first shard on.
            others = images - per_shard
            speeds = others / (predicted.seconds - predicted.first_seconds), others / _from_first_to_last(output)
            rows.append(
                [
                    str(workers),
                    str(images),
                    *(f"{speed:.2f}" for speed in speeds),
                    f"{100 * (speeds[0] / speeds[1] - 1):+.1f} %",
                    f"{predicted.seconds:.1f}",
                    f"{real['seconds']:.1f}",
                    f"{100 * (predicted.seconds / real['seconds'] - 1):+.1f} %",
                ]
            )
    return table(rows) + f"\nLoad of the machine at the end: {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs.\n"


def _both(before: Measured, after: Measured) -> Measured:
    """All images of two measurements, and the mean of what each has once."""
    first, second = dataclasses.asdict(before), dataclasses.asdict(after)
    pairs = {name: (first[name], second[name]) for name in first}
    return Measured(**{n: a + b if isinstance(a, list) else (a + b) / 2 for n, (a, b) in pairs.items()})


def _from_first_to_last(output: Path) -> float:
    """Seconds between a run's first shard and its last."""
    made = sorted(path.stat().st_mtime for path in (output / "masks").iterdir())
    return made[-1] - made[0]


def _run(options: argparse.Namespace, images: Path, output: Path, workers: int, per_shard: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "jobs.generate_masks", "--model", "demo", "--device", "cpu"]
    command += ["--points-per-side", str(options.points_per_side)]
    command += ["--images", str(images), "--output", str(output), "--images-per-shard", str(per_shard)]
    command += ["--num-workers", str(workers), "--cpus-per-worker", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    summary: dict[str, Any] = json.loads((output / "summary.json").read_text())
    return summary


# Tables


def _tables(options: argparse.Namespace) -> str:
    measured = Measured(**json.loads(options.measured.read_text())["alone"])
    measured = dataclasses.replace(measured, image_bytes=1000 * options.image_kilobytes)
    device = f"measured here, {sum(measured.make) / len(measured.make):.3f} s an image"
    if options.image_seconds:
        measured = measured.scaled(options.image_seconds)
        device = f"ASSUMED, {options.image_seconds:g} s an image, with the spread measured here"
    text = (
        "# A simulated cluster\n\n"
        f"* device: {device}; decoding, manifest and writing as measured here\n"
        f"* ASSUMED: {options.latency:g} s a request, {options.gigabits:g} Gbit/s, {S3_READS:.0f} reads a second, "
        f"{options.image_kilobytes:g} kB an image, {options.startup:g} s to start a machine's worker, "
        f"{options.reclaims:g} reclaims of a machine in an hour where nothing else is said, 120 s to replace it\n"
    )
    for section in options.sections:
        text += f"\n## {section.capitalize()}\n\n{table(_SECTIONS[section](options, measured))}"
    return text


def _cluster(options: argparse.Namespace, **changes: Any) -> Cluster:
    store = Store(options.latency, S3_READS, options.gigabits * 1e9 / 8)
    settings: dict[str, Any] = {
        "images": 11_000_000,
        "workers": 100,
        "store": store,
        "startup_seconds": options.startup,
        "reclaims_per_hour": options.reclaims,
    }
    return Cluster(**settings | changes)


def _row(outcome: Outcome, price: float | None) -> list[str]:
    hours = outcome.worker_seconds / 3600
    cost = [f"{hours * price:,.0f}"] if price is not None else []
    return [
        f"{outcome.images_per_second:,.1f}",
        f"{100 * outcome.efficiency:.1f} %",
        f"{100 * outcome.wasted:.2f} %",
        f"{outcome.seconds / 3600:,.2f}",
        f"{hours:,.0f}",
        *cost,
    ]


def _head(options: argparse.Namespace, *first: str) -> list[str]:
    cost = ["cost"] if options.price is not None else []
    return [*first, "images/s", "efficiency", "thrown away", "hours", "machine-hours", *cost]


def _scale(options: argparse.Namespace, measured: Measured) -> list[list[str]]:
    rows = [[*_head(options, "images", "workers", "images a shard"), "reads", "writes"]]
    for name, images in SIZES.items():
        for workers in WORKERS:
            for size in (256, 4096) if images > 10**8 else (256,):
                cluster = _cluster(options, images=images, workers=workers, images_per_shard=size)
                outcome = simulate(cluster, measured, datasets=5)
                counts = [f"{outcome.reads:,}", f"{outcome.writes:,}"]
                rows.append([name, str(workers), str(size), *_row(outcome, options.price), *counts])
    return rows


def _reclaims(options: argparse.Namespace, measured: Measured) -> list[list[str]]:
    rows = [_head(options, "reclaims of a machine in an hour", "images a shard")]
    for rate in (0.0, 0.05, 0.2, 1.0, 4.0):
        for size in (64, 256, 1024):
            cluster = _cluster(options, reclaims_per_hour=rate, images_per_shard=size)
            outcome = simulate(cluster, measured, datasets=3)
            rows.append([f"{rate:g}", str(size), *_row(outcome, options.price)])
    return rows


def _sizes(options: argparse.Namespace, measured: Measured) -> list[list[str]]:
    rows = [[*_head(options, "images a shard"), "Datasets"]]
    for size in (16, 64, 256, 1024, 4096, 16384):
        cluster = _cluster(options, images_per_shard=size)
        outcome = simulate(cluster, measured, datasets=5)
        rows.append([str(size), *_row(outcome, options.price), str(-(-cluster.shards // SHARDS_AT_ONCE))])
    return rows


def _depth(options: argparse.Namespace, measured: Measured) -> list[list[str]]:
    depths = (1, 2, 4, 8, 16, 32)
    rows = [["seconds a request", *(f"{depth} ahead" for depth in depths)]]
    for latency in (0.01, 0.1, 0.5):
        row = [f"{latency:g}"]
        for depth in depths:
            cluster = _cluster(
                options,
                images=256 * 1000,
                workers=10,
                read_ahead=depth,
                reclaims_per_hour=0.0,
                startup_seconds=0.0,
            )
            cluster = dataclasses.replace(cluster, store=dataclasses.replace(cluster.store, latency=latency))
            row.append(f"{simulate(cluster, measured).images_per_second / 10:.2f}")
        rows.append(row)
    return rows


def _skew(options: argparse.Namespace, measured: Measured) -> list[list[str]]:
    """Seconds of 100 workers with 10 and with 100 shards each, beside those without skew."""
    cases: dict[str, dict[str, Any]] = {
        "none": {},
        "one worker 10 times slower": {"slow": {50: 10.0}},
        "one worker frozen": {"slow": {50: math.inf}},
        "five workers 10 times slower": {"slow": dict.fromkeys(range(50, 55), 10.0)},
        "the last shard 20 times larger": {"large": {-1: 20.0}},
        "a shard in the middle 20 times larger": {"large": {-2: 20.0}},
    }
    ways = {
        "as before": (False, False),
        "largest first": (False, True),
        "repeats": (True, False),
        "both": (True, True),
    }
    rows = [["skew", "shards a worker", *ways, "repeated, of all work"]]
    for each in (10, 100):
        shards = 100 * each
        for name, case in cases.items():
            at = {-1: shards - 1, -2: shards // 2}
            large = {at[shard]: factor for shard, factor in case.get("large", {}).items()}
            row, outcome = [name, str(each)], None
            for repeats, largest_first in ways.values():
                cluster = _cluster(
                    options,
                    images=256 * shards,
                    reclaims_per_hour=0.0,
                    slow=case.get("slow", {}),
                    large=large,
                    repeats=repeats,
                    largest_first=largest_first,
                )
                outcome = simulate(cluster, measured)
                row.append("never" if outcome.seconds == math.inf else f"{outcome.seconds:,.0f} s")
            assert outcome is not None
            rows.append([*row, f"{100 * outcome.repeated_seconds / outcome.worker_seconds:.2f} %"])
    return rows


_SECTIONS: Final = {"scale": _scale, "reclaims": _reclaims, "sizes": _sizes, "depth": _depth, "skew": _skew}

if __name__ == "__main__":
    main()
