"""What it costs to plan a run and to take it up again, by the number of images, on a simulated object store.

    python benchmarks/planning.py [--keys 1000000 10000000] [--prefixes 1000] [--output FILE.md]

The store is tests/simulated_store.py, which lists 1,000 keys a page and takes `--page-seconds` for each. Each row
is measured in a process of its own: its CPU seconds, and its peak memory less what it has after its imports.
"Parsing" is of a page as S3 answers.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Final

import fsspec

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]

import simulated_store  # noqa: E402, F401 (registers the store)

from pipeline import documents, manifest, sources  # noqa: E402

IMAGES_PER_SHARD: Final = 256
PARSED_PAGES: Final = 20
HEADS: Final = {
    "listing": ["images", "prefixes", "s", "s of CPU", "images a second", "peak MiB"],
    "planning": [
        "images",
        "prefixes",
        "s",
        "s of CPU",
        "images a second",
        "peak MiB",
        "s to the first shards",
        "peak GB of disk",
        "GB of manifest",
    ],
    "parsing": ["pages of 1,000 keys", "ms of CPU a page, botocore's times", "ms of CPU a page, as here"],
    "resuming": ["images", "shards done", "s", "s of CPU", "peak MiB"],
}
_MIB: Final = 2**20


def main() -> None:
    """Measure, and print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", nargs="+", type=int, default=[1_000_000, 10_000_000])
    parser.add_argument("--prefixes", type=int, default=1000, help="folders that the keys are spread over")
    parser.add_argument("--page-seconds", type=float, default=0.06, help="what a page of the listing takes")
    parser.add_argument("--sections", nargs="+", default=list(HEADS), choices=list(HEADS))
    parser.add_argument("--output", help="file that receives the tables as Markdown")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        print(json.dumps(_MEASURES[options.row](options.keys[0], options.prefixes, options.page_seconds)))
        return
    import torch  # noqa: PLC0415 (not in the processes that are measured)
    from reporting import origin, table  # noqa: PLC0415

    text = origin(torch.device("cpu"))
    for section in options.sections:
        rows = [HEADS[section]]
        for keys in options.keys if section != "parsing" else options.keys[:1]:
            rows.append(_in_a_process(section, keys, options))
            print(f"{section}: {', '.join(rows[-1])}", file=sys.stderr, flush=True)
        text += f"\n## {section.capitalize()}\n\n{table(rows)}"
    print(text)
    if options.output:
        Path(options.output).write_text("# Planning\n\n" + text)


def _in_a_process(section: str, keys: int, options: argparse.Namespace) -> list[str]:
    command = [sys.executable, __file__, "--row", section, "--keys", str(keys)]
    command += ["--prefixes", str(options.prefixes), "--page-seconds", str(options.page_seconds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    row: list[str] = json.loads(done.stdout.splitlines()[-1])
    return row


def _listing(keys: int, prefixes: int, page_seconds: float) -> list[str]:
    _make_store(keys=keys, prefixes=prefixes, page_seconds=page_seconds)
    before, start = _peak(), time.monotonic()
    found = sum(1 for _ in sources.find_images("simulated://bucket/in", Counter()))
    assert found == keys
    seconds = time.monotonic() - start
    return _common(keys, prefixes, seconds, _peak() - before)


def _common(keys: int, prefixes: int, seconds: float, memory: float) -> list[str]:
    """The columns of listing and of planning; `memory` in MiB."""
    counts = [f"{keys:,}", f"{prefixes:,}", f"{seconds:.1f}", f"{time.process_time():.1f}"]
    return [*counts, f"{keys / seconds:,.0f}", f"{memory:.0f}"]


def _planning(keys: int, prefixes: int, page_seconds: float) -> list[str]:
    _make_store(keys=keys, prefixes=prefixes, page_seconds=page_seconds)
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryDirectory() as output:
        tempfile.tempdir = scratch  # where the manifest is sorted
        disk = _Disk(Path(scratch))
        before, start = _peak(), time.monotonic()
        images = sources.find_images("simulated://bucket/in", Counter())
        put: list[float] = []
        early = manifest.EarlyParts(lambda _: put.append(time.monotonic() - start))
        info = manifest.write_manifest(images, output, images_per_shard=IMAGES_PER_SHARD, early=early)
        seconds = time.monotonic() - start
        assert info.images == keys
        memory, manifest_bytes = _peak() - before, _size(Path(output))
        return [
            *_common(keys, prefixes, seconds, memory),
            f"{put[0]:.1f}",
            f"{disk.peak() / 1e9:.2f}",
            f"{manifest_bytes / 1e9:.2f}",
        ]


def _resuming(keys: int, _prefixes: int, page_seconds: float) -> list[str]:
    shards = -(-keys // IMAGES_PER_SHARD)
    _make_store(shards=shards, page_seconds=page_seconds)
    before, start = _peak(), time.monotonic()
    done = documents.shards_done("simulated://bucket/out", "masks")
    to_do = [shard for shard in range(shards + 1) if shard not in done]
    seconds = time.monotonic() - start
    assert to_do == [shards]
    return [f"{keys:,}", f"{shards:,}", f"{seconds:.1f}", f"{time.process_time():.1f}", f"{_peak() - before:.0f}"]


def _parsing(_keys: int, _prefixes: int, _page_seconds: float) -> list[str]:
    from botocore.parsers import ResponseParserFactory  # noqa: PLC0415
    from botocore.session import get_session  # noqa: PLC0415

    from pipeline.storage.s3 import _timestamp  # noqa: PLC0415

    shape = get_session().get_service_model("s3").operation_model("ListObjectsV2").output_shape
    keys = "".join(
        f"<Contents><Key>in/000042/{index:09d}.jpg</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
        f"<ETag>&quot;{index:032x}&quot;</ETag><Size>150000</Size><StorageClass>STANDARD</StorageClass></Contents>"
        for index in range(1000)
    )
    answer = {"status_code": 200, "headers": {}, "body": f"<ListBucketResult>{keys}</ListBucketResult>".encode()}
    row = [str(PARSED_PAGES)]
    for defaults in ({}, {"timestamp_parser": _timestamp}):
        factory = ResponseParserFactory()
        factory.set_parser_defaults(**defaults)
        start = time.process_time()
        for _ in range(PARSED_PAGES):
            assert len(factory.create_parser("rest-xml").parse(answer, shape)["Contents"]) == 1000
        row.append(f"{1000 * (time.process_time() - start) / PARSED_PAGES:.1f}")
    return row


_MEASURES: Final = {"listing": _listing, "planning": _planning, "parsing": _parsing, "resuming": _resuming}


def _make_store(**arguments: float) -> None:
    fsspec.config.conf["simulated"] = arguments


class _Disk:
    """The most bytes that were in a folder, looked at four times a second."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._peak, self._stop = folder, 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def peak(self) -> int:
        self._stop.set()
        self._thread.join()
        return self._peak

    def _watch(self) -> None:
        while not self._stop.wait(0.25):
            self._peak = max(self._peak, _size(self._folder))


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # deleted since
            continue
    return total


def _peak() -> float:
    """Of this process's resident memory so far, in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024 / _MIB


if __name__ == "__main__":
    main()
