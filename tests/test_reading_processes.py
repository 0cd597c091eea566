"""Reading in processes: scripts that end with it, workers that are spawned, and how `MaskTable` holds its rows."""

import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
from curated_masks import SIZE, masks_run, record
from known_masks import blobs
from running import rows
from torch.utils.data import DataLoader

from pipeline import storage
from pipeline.errors import ImageError
from pipeline.reading import MaskTable, samples
from pipeline.reading.skipped import Skipped
from schemas.masks import MASKS_SCHEMA, Status

IMAGES, ENDINGS = 13, 6

SHORT = """
import sys
from pipeline.reading import open_masks
open_masks(sys.argv[1]).to_table()
"""
# Without torch, whose end takes longer.
SHORTER = """
import sys
import pyarrow.dataset
from pipeline import storage
shards, folder = sys.argv[1:]
if folder.startswith("memory://"):
    for name in storage.list_names(shards):
        storage.write_atomic(f"{folder}/{name}", storage.read_bytes(f"{shards}/{name}"))
uris = [f"{folder}/{name}" for name in storage.list_names(folder)]
filesystem, _ = storage.arrow_filesystem(folder)
pyarrow.dataset.dataset(uris, filesystem=filesystem, format="parquet").to_table()
"""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """13 images with two masks each in 7 shards."""
    masks = [[record(mask) for mask in blobs(2, *SIZE, seed=seed)] for seed in range(IMAGES)]
    return Path(masks_run(tmp_path_factory.mktemp("dataset"), masks).config.output.removeprefix("file://"))


def endings(script: str, *arguments: str | Path) -> list[str]:
    """What processes that end with this script complain of, each."""

    def end(_: int) -> str:
        command = [sys.executable, "-c", script, *map(str, arguments)]
        ended = subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ)
        return f"{ended.returncode}: {ended.stderr}" if ended.returncode else ""

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(end, range(ENDINGS)))


def test_a_script_ends_right_after_reading(dataset: Path) -> None:
    assert endings(SHORT, dataset) == [""] * ENDINGS


def test_a_script_ends_right_after_reading_from_other_stores(dataset: Path, bucket: str) -> None:
    for path in (dataset / "masks").iterdir():
        storage.write_atomic(f"{bucket}/masks/{path.name}", path.read_bytes())
    for folder in ("memory://masks", f"{bucket}/masks"):
        assert endings(SHORTER, dataset / "masks", folder) == [""] * ENDINGS


@pytest.mark.parametrize("start", ["spawn", "forkserver"])
def test_workers_of_every_kind_read_a_table(dataset: Path, start: str) -> None:
    loader = DataLoader(
        MaskTable(str(dataset)), batch_size=4, collate_fn=list, num_workers=1, multiprocessing_context=start
    )
    read = [sample for batch in loader for sample in batch]
    assert [sample.image_id for sample in read] == list(range(IMAGES))
    assert all(sample.image_3HW is not None for sample in read)


def test_rows_stay_in_the_chunks_that_were_read(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = rows(dataset)
    parts = [expected[8:], expected[:1], [], expected[4:8], expected[1:4]]
    chunks = pa.concat_tables([pa.Table.from_pylist(part, MASKS_SCHEMA) for part in parts])
    monkeypatch.setattr(samples, "open_masks", lambda uri: SimpleNamespace(to_table=lambda **_: chunks))
    before = pa.total_allocated_bytes()
    table = MaskTable(str(dataset), images=False, masks="rle")
    assert pa.total_allocated_bytes() - before < chunks.nbytes / 2, "nothing is copied"
    found = list(table)
    assert [sample.image_id for sample in found] == [row["image_id"] for row in expected]
    assert [sample.masks for sample in found] == [[m["segmentation"] for m in row["masks"]] for row in expected]


def test_what_is_skipped_is_counted_in_each_process() -> None:
    skipped = Skipped()
    skipped.failure(3, ImageError(Status.CHANGED, "another"))
    assert (skipped.images, pickle.loads(pickle.dumps(skipped)).images) == (1, 0)
