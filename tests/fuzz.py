"""`make fuzz`: damaged files for the readers of images, tars, Parquet files and lists.

Each case is a real file, mutated as its number says, so `--first N --cases 1` repeats one. What is documented is
an image, a row with a status, or an error of the exception tree. Anything else is a finding, and so is the death
of a decoder: it is printed, its file is kept, and the exit code is 1.
"""

import argparse
import csv
import io
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from test_image_refusals import mutated, seeds
from test_sources import tar_bytes

from pipeline.config import ImagesConfig
from pipeline.decoding import Decoders
from pipeline.errors import EverymaskError, ImageError
from pipeline.sources import ImageRef, fetch, find_images
from schemas.masks import Status

LIMITS = ImagesConfig(max_pixels=10**7, decode_timeout=20, decode_memory="1GiB")
DEATHS = {Status.DECODER_CRASH, Status.TIMEOUT, Status.OUT_OF_MEMORY}


def containers() -> dict[str, bytes]:
    """Tars, Parquet files and lists, by name."""
    images = list(seeds().values())[:6]
    table, links, text = io.BytesIO(), io.BytesIO(), io.StringIO()
    pq.write_table(pa.table({"image": images}), table, row_group_size=2)
    pq.write_table(pa.table({"uri": ["a.jpg", "b c.png", "../d.jpg"]}), links)
    csv.writer(text).writerows([["id", "url"], [1, "a.jpg"], [2, 'b "c", d.jpg']])
    return {
        "a.tar": tar_bytes(*((f"{index}.jpg", data) for index, data in enumerate(images))),
        "a.parquet": table.getvalue(),
        "list.parquet": links.getvalue(),
        "list.csv": text.getvalue().encode(),
        "list.txt": "a.jpg\nb c.png\n# no comment\nfile:///nowhere/é.jpg\n".encode(),
    }


IMAGES, CONTAINERS = seeds(), containers()


def damaged(number: int) -> tuple[str, bytes]:
    """The name and the bytes of a case."""
    rng = np.random.default_rng(number)
    files = IMAGES if rng.random() < 0.7 else CONTAINERS
    name = str(rng.choice(list(files)))
    return name, mutated(files[name], rng)


def outcome(name: str, data: bytes, decoders: Decoders, folder: Path) -> str:
    """What became of a case, in a word. Raises what nobody documented."""
    if name not in CONTAINERS:
        try:
            decoders(data)
        except ImageError as error:
            if error.status in DEATHS:
                raise
            return str(error.status)
        return "image"
    (folder / name).write_bytes(data)
    try:
        for ref in find_images((folder / name).as_uri(), Counter()):
            fetched(ref)
    except EverymaskError as error:
        return type(error).__name__
    return "listed"


def fetched(ref: ImageRef) -> None:
    try:
        fetch(ref, max_bytes=10**7)
    except ImageError:
        return


def findings(first: int, cases: int, seconds: float) -> Iterator[str]:
    """Run until cases or time are used up."""
    counts: Counter[str] = Counter()
    end = time.monotonic() + seconds
    with Decoders(LIMITS) as decoders, tempfile.TemporaryDirectory() as folder:
        for number in range(first, first + cases):
            if time.monotonic() > end:
                break
            name, data = damaged(number)
            try:
                counts[outcome(name, data, decoders, Path(folder))] += 1
            except Exception as error:  # noqa: BLE001 (that is what is looked for)
                kept = Path(tempfile.gettempdir()) / f"finding-{number}"
                kept.write_bytes(data)
                yield f"case {number}, {name}, kept in {kept}: {error!r}"
    print(f"{counts.total()} cases from {first} on: {dict(counts.most_common())}")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--cases", type=int, default=10**9, help="how many at most")
    parser.add_argument("--seconds", type=float, default=120, help="how long at most")
    options = parser.parse_args()
    failed = False
    for finding in findings(options.first, options.cases, options.seconds):
        print(finding, flush=True)
        failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
