"""What a worker takes for each image and shard, alone and where another works beside it.

    python benchmarks/measured_worker.py PICTURES POINTS_PER_SIDE

is one worker, with the weights that come along: it says `ready`, waits for a line, makes a shard of the folder's
pictures, and prints a `Measured` as JSON. `measure` starts such workers.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import torch

ROOT: Final = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from cluster_model import Measured  # noqa: E402
from running import jpeg  # noqa: E402

from pipeline import engine, manifest, sources  # noqa: E402
from pipeline import run as runs  # noqa: E402
from pipeline.amg.selfcheck import checked_model  # noqa: E402
from pipeline.config import AmgConfig, MasksConfig, ModelConfig  # noqa: E402
from pipeline.decoding import Decoders  # noqa: E402
from pipeline.predict import content_of, weights_of  # noqa: E402
from pipeline.shard import make_shard  # noqa: E402

PIECE: Final = (321, 481)
"""Height and width of the pieces of photographs."""
NICENESS: Final = 15
"""Of Ray's workers, unless one says otherwise."""


def measure(images: int, points_per_side: int) -> dict[str, dict[str, Any]]:
    """A worker's times, as JSON, where it is `alone`, and where another works `beside` it."""
    with tempfile.TemporaryDirectory() as folder:
        pictures = Path(folder, "in")
        write_pictures(pictures, images)
        counts = {"alone": 1, "beside": 2}
        return {n: dataclasses.asdict(at_once(pictures, points_per_side, count)) for n, count in counts.items()}


def write_pictures(folder: Path, count: int) -> None:
    """So many pieces of photographs in a new folder."""
    folder.mkdir()
    for index in range(count):
        (folder / f"{index:05d}.jpg").write_bytes(jpeg(index, PIECE))


def at_once(pictures: Path, points_per_side: int, count: int) -> Measured:
    """The first of so many workers that work at the same time, beside a Ray; all begin when all are ready."""
    command = [sys.executable, __file__, str(pictures), str(points_per_side)]
    workers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(count)
    ]
    for worker in workers:
        assert worker.stdout
        worker.stdout.readline()
    answers = []
    with engine.connected():
        for worker in workers:
            assert worker.stdin
            worker.stdin.write("go\n")
            worker.stdin.flush()
        for worker in workers:
            answers.append(worker.communicate()[0])
            if worker.returncode:
                sys.exit(f"a worker ended with exit code {worker.returncode}")
    return Measured(**json.loads(answers[0].splitlines()[-1]))


def _work(pictures: Path, points_per_side: int, output: Path) -> None:
    """Make one shard of the pictures as a worker does, and print what took how long."""
    torch.set_num_threads(1)
    os.nice(NICENESS)
    config = MasksConfig(
        images=pictures.as_uri(),
        output=output.as_uri(),
        images_per_shard=len(list(pictures.iterdir())),
        model=ModelConfig(model="demo", device="cpu"),
        amg=AmgConfig(points_per_side=points_per_side),
    )
    model = checked_model(config.model)
    run = runs.open_run(config, weights_of(model))
    content = content_of(config, model)
    seconds: dict[str, list[float]] = {"decode": [], "make": []}
    last = 0.0

    def decode(data: bytes) -> Any:
        start = time.perf_counter()
        rgb_HW3 = decoders(data)
        seconds["decode"].append(time.perf_counter() - start)
        return rgb_HW3

    def of_image(rgb_HW3: Any) -> Any:
        nonlocal last
        start = time.perf_counter()
        row = content.of_image(rgb_HW3)
        last = time.perf_counter()
        seconds["make"].append(last - start)
        return row

    with Decoders(config.reading) as decoders:
        content.of_image(decoders(jpeg(0, PIECE)))
        print("ready", flush=True)
        sys.stdin.readline()
        make_shard(0, config, dataclasses.replace(content, of_image=of_image), decode, run.provenance)
        write = time.perf_counter() - last
        start = time.perf_counter()
        rows = manifest.read_shard(config.output, 0)
        plan = time.perf_counter() - start
        fetch = []
        for row in rows:
            start = time.perf_counter()
            sources.fetch(row.ref, max_bytes=2**30)
            fetch.append(time.perf_counter() - start)
    size = sum(row.ref.size or 0 for row in rows) / len(rows)
    print(json.dumps(dataclasses.asdict(Measured(fetch, **seconds, plan=plan, write=write, image_bytes=size))))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as output:
        _work(Path(sys.argv[1]), int(sys.argv[2]), Path(output))
