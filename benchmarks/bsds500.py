"""From a bucket to training data, every command once: BSDS500's photographs in a real S3 server on this machine.

    python benchmarks/bsds500.py --bsds BSDS500 [--images 300] [--output FILE.md] [--keep FOLDER]

Puts train's and val's photographs into a bucket and makes masks of them with the weights that come along; then
verifies, curates, exports, reports, and measures against the human segments of val. Three tables: each command
with its exit code and time, what each curation leaves and recalls, and the recall of the input by size.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in (".", "tests")]

from reporting import origin, table  # noqa: E402
from s3server import run_s3_server  # noqa: E402

from pipeline import storage  # noqa: E402

ROOT: Final = Path(__file__).parents[1]
CURATIONS: Final[dict[str, list[str]]] = {
    "masks": [],
    "distinct-90": ["--mask-iou-thresh", "0.9"],
    "distinct-80": ["--mask-iou-thresh", "0.8"],
    "distinct-70": ["--mask-iou-thresh", "0.7"],
    "tree": ["--min-area", "100", "--mask-iou-thresh", "0.8", "--hierarchy-thresh", "0.9"],
    "flat": ["--min-area", "100", "--mask-iou-thresh", "0.8", "--flatten", "smallest"],
}
"""Flags of jobs.curate_masks by the name of the output; of the first there are none, it is the input."""
FORMATS: Final = ("coco", "sa1b", "yolo-seg", "png", "panoptic")


@dataclass
class Course:
    """Where the commands read and write, and what they took."""

    bucket: str
    truth: Path
    folder: Path
    taken: list[list[str]] = field(default_factory=list)

    def run(self, job: str, *flags: object) -> float:
        """Run a command, and return its seconds; the first that fails ends all."""
        words = [f"jobs.{job}", *map(str, flags)]
        shown = shlex.join(["python", "-m", *words]).replace(self.bucket, "s3://bucket")
        shown = shown.replace(str(self.truth), "BSDS500/groundTruth/val").replace(str(self.folder), "FOLDER")
        print(f"+ {shown}", file=sys.stderr, flush=True)
        start = time.monotonic()
        done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, check=False, stdout=subprocess.DEVNULL)
        seconds = time.monotonic() - start
        self.taken.append([f"`{shown}`", str(done.returncode), f"{seconds:.1f}"])
        if done.returncode:
            sys.exit(f"exit code {done.returncode}")
        return seconds

    def document(self, name: str) -> dict[str, Any]:
        """A JSON file of the bucket."""
        document: dict[str, Any] = json.loads(storage.read_bytes(f"{self.bucket}/{name}"))
        return document


def main() -> None:
    """Run the commands and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bsds", type=Path, required=True, help="folder of BSDS500")
    parser.add_argument("--images", type=int, default=300, help="val's come first")
    parser.add_argument("--output", type=Path, help="file for the tables")
    parser.add_argument("--keep", type=Path, help="folder for report and evaluations, which are kept")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bsds500-") as name:
        folder = options.keep or Path(name)
        folder.mkdir(exist_ok=True)
        data = Path(name) / "s3"
        data.mkdir()
        with run_s3_server(data) as server:
            os.environ.update(server.environment)
            bucket = server.make_bucket()
            photographs = [
                path
                for split in ("val", "train")
                for path in sorted((options.bsds / "images" / split).glob("*.jpg"))
            ]
            for path in photographs[: options.images]:
                server.put(f"{bucket}/photos/{path.name}", path.read_bytes())
            course = Course(bucket, options.bsds / "groundTruth" / "val", folder)
            text = measure(course)
    print(text)
    if options.output:
        options.output.write_text(text)


def measure(course: Course) -> str:
    """All commands, as text."""
    bucket = course.bucket
    model = ["--model", "demo", "--points-per-side", 16]
    shards = ["--images-per-shard", 25]
    course.run("generate_masks", "--images", f"{bucket}/photos", "--output", f"{bucket}/masks", *model, *shards)
    rows = [["dataset", "flags", "seconds", "masks", "removed", "AR@10", "AR@100", "AR@1000", "best IoU"]]
    by_size: list[list[str]] = []
    made = course.document("masks/summary.json")["masks"]
    for name, flags in CURATIONS.items():
        seconds = 0.0
        if flags:
            seconds = course.run(
                "curate_masks", "--input", f"{bucket}/masks", "--output", f"{bucket}/{name}", *flags
            )
        course.run("verify_masks", "--output", f"{bucket}/{name}")
        masks = course.document(f"{name}/summary.json")["masks"]
        evaluated = course.folder / f"{name}.json"
        course.run("evaluate_masks", "--input", f"{bucket}/{name}", "--truth", course.truth, "--output", evaluated)
        [found] = json.loads(evaluated.read_text())["tables"]
        of_all = dict(zip(found["columns"], next(row for row in found["rows"] if row[0] == "all"), strict=True))
        if not by_size:
            by_size = [list(found["columns"]), *([_digits(value) for value in row] for row in found["rows"])]
        recalls = [f"{of_all[column]:.3f}" for column in ("AR@10", "AR@100", "AR@1000", "best IoU")]
        shown = [f"`{shlex.join(flags)}`", f"{seconds:.1f}"] if flags else ["", ""]
        rows.append([name, *shown, str(masks), f"{1 - masks / made:.1%}", *recalls])
    for form in FORMATS:
        course.run("export_masks", "--input", f"{bucket}/masks", "--output", f"{bucket}/{form}", "--format", form)
    for name in ("masks", "tree"):
        course.run("report", "--input", f"{bucket}/{name}", "--output", course.folder / f"report-{name}")
    tuned = ["--sample", 4, "--points-per-side", 8, "--points-per-side", 16, "--model", "demo"]
    course.run("tune", "--images", f"{bucket}/photos", "--output", course.folder / "tune", *tuned)
    summary = course.document("masks/summary.json")
    counts = ", ".join(f"{summary[key]} {key}" for key in ("images", "ok", "empty", "failed", "masks", "bytes"))
    return (
        f"{origin(torch.device('cpu'))}* {counts}\n\n## The commands\n\n"
        f"{table([['command', 'exit code', 'seconds'], *course.taken])}\n## What curation leaves\n\n"
        f"Recall is of the segments of val's photographs among them.\n\n{table(rows)}\n"
        f"## What the input recalls, by size\n\n{table(by_size)}"
    )


def _digits(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else "" if value is None else str(value)


if __name__ == "__main__":
    main()
