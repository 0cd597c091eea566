"""`python -m chaos --seed 1 2 3`: disturbed runs, a row of a Markdown table each."""

import argparse
import os
import tempfile
from pathlib import Path

from s3server import run_s3_server

from chaos.events import draw_events
from chaos.tally import HEADER
from chaos.trial import Course, run_trial
from jobs.seeded_checkpoint import seeded_checkpoint


def main() -> None:
    """Run the trials that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m chaos", description=__doc__)
    parser.add_argument("--seed", type=int, nargs="+", default=[1], help="one trial each")
    parser.add_argument("--events", type=int, default=33, help="drawn; the last may come too late")
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--images-per-shard", type=int, default=5)
    parser.add_argument("--logs", type=Path, help="a folder that keeps the drivers' logs")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        folder = Path(name)
        logs = asked.logs or folder
        logs.mkdir(exist_ok=True)
        checkpoint = folder / "tiny.safetensors"
        seeded_checkpoint(output=str(checkpoint), seed=0, image_size=64)
        (folder / "s3").mkdir()
        with run_s3_server(folder / "s3") as server:
            os.environ.update(server.environment)
            course = Course(
                server=server,
                bucket=server.make_bucket(),
                checkpoint=checkpoint,
                folder=logs,
                images=asked.images,
                images_per_shard=asked.images_per_shard,
            )
            course.prepare()
            print(HEADER, flush=True)
            for seed in asked.seed:
                tally = run_trial(course, seed, draw_events(seed, asked.events, asked.images))
                print(tally.row(), flush=True)


if __name__ == "__main__":
    main()
