"""A curated dataset read: the columns that only it has, in Arrow, in DuckDB and in samples."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq
import pytest
import torch
from curated_masks import SIZE, STEPS, curated, make, masks_run, record
from known_masks import blobs, box
from running import rows

from pipeline.curation.config import StepsConfig
from pipeline.reading import MaskSamples, MaskTable, open_masks
from schemas.curated import CURATED_SCHEMA

READERS = [MaskSamples, MaskTable]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Three images in two shards: masks of which one lies in another, none, and one that failed."""
    nested = [record(box(SIZE, *corners)) for corners in ((0, 0, 60, 60), (10, 10, 40, 40), (70, 70, 90, 90))]
    return make(curated(masks_run(tmp_path, [nested, [], None]), StepsConfig(hierarchy_thresh=0.9)))


def test_arrow_and_duckdb_read_every_column(output: Path) -> None:
    masks = open_masks(str(output))
    assert masks.schema.equals(CURATED_SCHEMA)
    read = sorted(masks.to_table().to_pylist(), key=lambda row: row["image_id"])
    assert read == rows(output)
    assert [row["coverage"] is None for row in read] == [False, False, True]
    found = duckdb.sql("SELECT uncovered_area, unnest(masks).depth FROM masks WHERE status = 'ok'").fetchall()
    assert [depth for _, depth in found] == [0, 1, 0]
    assert {area for area, _ in found} == {read[0]["uncovered_area"]}


@pytest.mark.parametrize("read", READERS)
def test_samples_say_where_masks_lie_in_one_another(output: Path, read: Callable[..., Any]) -> None:
    nested, empty = read(str(output), with_empty=True)
    assert nested.parent_N.tolist() == [-1, 0, -1]
    assert nested.depth_N.tolist() == [0, 1, 0]
    assert nested.parent_N.dtype == nested.depth_N.dtype == torch.int64
    assert empty.parent_N.shape == empty.depth_N.shape == (0,)


@pytest.mark.parametrize("read", READERS)
def test_without_a_hierarchy_no_place_is_told(tmp_path: Path, read: Callable[..., Any]) -> None:
    source = masks_run(tmp_path, [[record(mask) for mask in blobs(3, *SIZE)]])
    [plain] = read(source.config.output, images=False)
    assert plain.parent_N is plain.depth_N is None
    output = make(curated(source, STEPS.model_copy(update={"hierarchy_thresh": None})))
    assert pq.read_schema(output / "masks/part-00000.parquet").equals(CURATED_SCHEMA)
    [flat] = read(str(output), images=False)
    assert flat.parent_N.tolist() == flat.depth_N.tolist() == [-1] * len(flat.masks)
