"""Reading a masks dataset: as Arrow, as samples by number, as a stream with workers, ranks and resume."""

import io
import itertools
import json
import pickle
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco
from running import make_dataset, rows, write_jpegs
from s3server import S3Server
from sa1b_folder import annotation, imported, write_sa1b
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from pipeline import storage
from pipeline.config import AmgConfig, MasksConfig, ModelConfig
from pipeline.errors import OutputConflict, SettingsError, TrainingDataError
from pipeline.reading import MaskSamples, MaskTable, Sample, open_masks
from pipeline.reading.stream import BLOCK
from schemas.masks import MASKS_SCHEMA, SCHEMA_VERSION, Status

IMAGES, NO_IMAGE, EMPTY = 13, 4, 7
WITH_MASKS = [number for number in range(IMAGES) if number not in {NO_IMAGE, EMPTY}]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """`images` and `out`: 13 images in 7 shards, one of which is no image and one without masks."""
    folder = tmp_path_factory.mktemp("reading")
    (write_jpegs(folder / "images", IMAGES) / f"{NO_IMAGE:04d}.jpg").write_bytes(b"<html>")
    config = MasksConfig(
        images=str(folder / "images"),
        output=str(folder / "out"),
        images_per_shard=2,
        amg=AmgConfig(points_per_side=2, pred_iou_thresh=-10, stability_score_thresh=0, box_nms_thresh=1),
        model=ModelConfig(checkpoint=str(tiny_checkpoint)),
    )
    make_dataset(config, tiny_checkpoint)
    shard = folder / "out" / "masks" / f"part-{EMPTY // 2:05d}.parquet"
    changed = pq.read_table(shard).to_pylist()
    changed[EMPTY % 2] |= {"status": Status.EMPTY, "masks": []}
    pq.write_table(pa.Table.from_pylist(changed, MASKS_SCHEMA), shard)
    return folder


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    """The same dataset, for tests that change it or its images."""
    shutil.copytree(made / "images", tmp_path / "images")
    shutil.copytree(made / "out", tmp_path / "out")
    here, there = storage.canonical_uri(str(tmp_path)), storage.canonical_uri(str(made))
    [manifest] = (tmp_path / "out" / "manifest").iterdir()
    parts = [pq.ParquetFile(manifest).read_row_group(group) for group in range(7)]
    with pq.ParquetWriter(manifest, parts[0].schema) as writer:
        for part in parts:
            moved = [row | {"uri": row["uri"].replace(there, here)} for row in part.to_pylist()]
            writer.write_table(pa.Table.from_pylist(moved, part.schema))
    return tmp_path


def ids(samples: Iterable[Sample]) -> list[int]:
    return [sample.image_id for sample in samples]


def loader(samples: MaskSamples, workers: int, kind: Callable[..., Any] = DataLoader) -> Any:
    return kind(samples, batch_size=None, num_workers=workers)


def test_arrow_reads_columns_and_filters(made: Path) -> None:
    masks = open_masks(str(made / "out"))
    assert masks.schema.equals(MASKS_SCHEMA)
    assert masks.count_rows() == IMAGES
    found = masks.to_table(columns=["image_id", "height"], filter=pc.field("status") == "ok")
    assert sorted(found["image_id"].to_pylist()) == WITH_MASKS
    assert found.column_names == ["image_id", "height"]
    again = pickle.loads(pickle.dumps(masks))
    assert sorted(again.to_table().to_pylist(), key=lambda row: row["image_id"]) == rows(made / "out")


def test_a_dataset_in_a_bucket_is_read_with_its_images(
    made: Path, s3_server: S3Server, bucket: str, tiny_checkpoint: Path
) -> None:
    for path in sorted((made / "images").iterdir())[:3]:
        storage.write_atomic(f"{bucket}/images/{path.name}", path.read_bytes())
    config = MasksConfig(
        images=f"{bucket}/images",
        output=f"{bucket}/out",
        amg=AmgConfig(points_per_side=1),
        model=ModelConfig(checkpoint=str(tiny_checkpoint)),
    )
    make_dataset(config, tiny_checkpoint)
    masks = open_masks(f"{bucket}/out")
    for dataset in (masks, pickle.loads(pickle.dumps(masks))):
        assert dataset.to_table()["image_id"].to_pylist() == [0, 1, 2]
    samples = list(MaskSamples(f"{bucket}/out", with_empty=True))
    assert [sample.image_3HW is not None for sample in samples] == [True] * 3


def test_a_sample_is_the_row_and_its_image(made: Path) -> None:
    [row] = [row for row in rows(made / "out") if row["image_id"] == 3]
    [sample] = [sample for sample in MaskSamples(str(made / "out")) if sample.image_id == 3]
    assert sample.image_3HW is not None
    expected = np.array(Image.open(made / "images" / "0003.jpg"))
    assert np.array_equal(sample.image_3HW.permute(1, 2, 0).numpy(), expected)
    assert isinstance(sample.masks, torch.Tensor)
    assert sample.masks.dtype == torch.bool
    decoded = coco.decode([mask["segmentation"] for mask in row["masks"]]).transpose(2, 0, 1)
    assert np.array_equal(sample.masks.numpy(), decoded)
    for mask, box in zip(decoded, sample.boxes_N4_xyxy.tolist(), strict=True):
        y, x = np.nonzero(mask)
        assert box == ([x.min(), y.min(), x.max() + 1, y.max() + 1] if len(x) else [0, 0, 0, 0])
    assert sample.predicted_iou_N.tolist() == [mask["predicted_iou"] for mask in row["masks"]]
    np.testing.assert_equal(sample.stability_N.numpy(), np.float32([m["stability_score"] for m in row["masks"]]))
    [plain] = [s for s in MaskSamples(str(made / "out"), masks="rle", images=False) if s.image_id == 3]
    assert plain.masks == [mask["segmentation"] for mask in row["masks"]]
    assert plain.image_3HW is plain.problem is None


def test_images_with_masks_are_given_and_empty_ones_if_asked_for(made: Path) -> None:
    output = str(made / "out")
    assert ids(MaskSamples(output)) == WITH_MASKS
    assert ids(MaskSamples(output, with_empty=True)) == sorted([*WITH_MASKS, EMPTY])
    table = MaskTable(output, with_empty=True)
    assert ids(table) == sorted([*WITH_MASKS, EMPTY])
    empty = table[ids(table).index(EMPTY)]
    assert empty.image_3HW is not None
    assert isinstance(empty.masks, torch.Tensor)
    assert (empty.masks.shape, empty.boxes_N4_xyxy.shape) == ((0, 96, 128), (0, 4))


def test_a_table_gives_samples_by_number(made: Path) -> None:
    table = MaskTable(str(made / "out"))
    assert len(table) == len(WITH_MASKS)
    for ours, streamed in zip(table, MaskSamples(str(made / "out")), strict=True):
        assert ours.image_id == streamed.image_id
        assert torch.equal(ours.image_3HW, streamed.image_3HW)  # type: ignore[arg-type]
        assert torch.equal(ours.masks, streamed.masks)  # type: ignore[arg-type]
    with pytest.raises(IndexError):
        table[len(table)]
    shuffled = DataLoader(table, batch_size=None, shuffle=True, num_workers=1)
    assert sorted(ids(shuffled)) == WITH_MASKS


def test_the_order_is_the_seeds_and_the_epochs(made: Path) -> None:
    samples = MaskSamples(str(made / "out"), images=False, masks="rle", seed=1, blocks_mixed=3)
    orders = []
    for epoch in (0, 1, 0):
        samples.set_epoch(epoch)
        orders.append(ids(samples))
    assert orders[0] == orders[2]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == WITH_MASKS
    assert orders[0] != ids(MaskSamples(str(made / "out"), images=False, seed=2, blocks_mixed=3))
    neighbours = [abs(a - b) for a, b in itertools.pairwise(orders[0])]
    assert max(neighbours) > 2, "blocks are mixed"


def test_a_dataset_of_one_block_has_another_order_in_each_epoch(tmp_path: Path) -> None:
    images = write_sa1b(
        tmp_path / "images", {f"sa_{i}": [annotation(np.ones((8, 8), bool))] for i in range(9)}, (8, 8)
    )
    samples = MaskSamples(str(imported(images, tmp_path / "out")), images=False, seed=1)
    first = ids(samples)
    samples.set_epoch(1)
    second = ids(samples)
    assert sorted(first) == sorted(second) == list(range(9))
    assert first != second


def test_ranks_and_workers_share_the_images_out(made: Path) -> None:
    found = []
    for rank in range(2):
        samples = MaskSamples(str(made / "out"), images=False, seed=3, rank=rank, world_size=2)
        found += ids(loader(samples, 2))
    assert sorted(found) == WITH_MASKS


def test_shards_of_several_blocks_are_read_whole(tmp_path: Path, made: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(made / "out", output)
    count = BLOCK + 10 + 30
    document = json.loads((output / "run.json").read_text())
    document["manifest"] |= {"images": count, "shards": 2}
    document["determinants"]["images_per_shard"] = BLOCK + 10
    (output / "run.json").write_text(json.dumps(document))
    [listing] = (output / "manifest").iterdir()
    one, listed = rows(made / "out")[0], pq.read_table(listing).to_pylist()[0]
    parts = [range(BLOCK + 10), range(BLOCK + 10, count)]
    with pq.ParquetWriter(listing, pq.read_schema(listing)) as writer:
        for shard, numbers in enumerate(parts):
            table = pa.Table.from_pylist([one | {"image_id": i} for i in numbers], MASKS_SCHEMA)
            pq.write_table(table, output / "masks" / f"part-{shard:05d}.parquet", row_group_size=48)
            writer.write_table(pa.Table.from_pylist([listed | {"image_id": i} for i in numbers], writer.schema))
    assert ids(MaskSamples(str(output), images=False, masks="rle")) == list(range(count))
    parts_read = [ids(MaskSamples(str(output), images=False, seed=0, rank=i, world_size=3)) for i in range(3)]
    assert sorted(itertools.chain(*parts_read)) == list(range(count))
    assert min(map(len, parts_read)) > 0


def test_an_endless_stream_goes_on_with_the_next_epoch(made: Path) -> None:
    once = MaskSamples(str(made / "out"), images=False, seed=0)
    expected = ids(once)
    once.set_epoch(1)
    expected += ids(once)
    endless = MaskSamples(str(made / "out"), images=False, seed=0, endless=True)
    assert ids(itertools.islice(endless, len(expected))) == expected


def resumed(samples: MaskSamples, state: dict[str, Any]) -> MaskSamples:
    samples.load_state_dict(json.loads(json.dumps(state)))
    return samples


def test_a_stream_goes_on_behind_its_state_and_begins_anew_after_that(made: Path) -> None:
    def new() -> MaskSamples:
        return MaskSamples(str(made / "out"), images=False, seed=5, blocks_mixed=2)

    samples = new()
    samples.set_epoch(3)
    whole = ids(samples)
    for count in range(len(whole) + 1):
        first = new()
        first.set_epoch(3)
        before = ids(itertools.islice(first, count))
        again = resumed(new(), first.state_dict())
        again.set_epoch(3)  # as a loop over epochs does
        assert before + ids(again) == whole
        assert ids(again) == whole


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # torchdata with this PyTorch
def test_torchdatas_loader_resumes_exactly(made: Path) -> None:
    def new(workers: int) -> Any:
        return loader(MaskSamples(str(made / "out"), seed=5, blocks_mixed=2), workers, StatefulDataLoader)

    for workers in (0, 2):
        first = new(workers)
        whole = ids(first)
        assert sorted(whole) == WITH_MASKS
        begun = new(workers)
        before = ids(itertools.islice(begun, 4))
        state = begun.state_dict()
        again = new(workers)
        again.load_state_dict(state)
        assert before + ids(again) == whole
        assert ids(again) == whole, "the pass after that is whole"


def test_pytorchs_loader_resumes_by_what_was_used(made: Path) -> None:
    samples = MaskSamples(str(made / "out"), images=False, seed=5, blocks_mixed=2)
    used = []
    for sample in itertools.islice(loader(samples, 2), 5):
        samples.passed(sample.at)
        used.append(sample.image_id)
    again = resumed(MaskSamples(str(made / "out"), images=False, seed=5, blocks_mixed=2), samples.state_dict())
    rest = ids(loader(again, 2))
    assert sorted(used + rest) == WITH_MASKS
    assert sorted(ids(loader(again, 2))) == WITH_MASKS, "the pass after that is whole"


def test_a_state_of_another_order_is_refused_and_the_difference_named(made: Path) -> None:
    samples = MaskSamples(str(made / "out"), images=False, seed=5)
    ids(itertools.islice(samples, 2))
    state = samples.state_dict()
    with pytest.raises(SettingsError, match=r"seed \(5 there, 6 here\)"):
        MaskSamples(str(made / "out"), images=False, seed=6).load_state_dict(state)
    with pytest.raises(SettingsError, match="1 processes that read, and this DataLoader has 2"):
        list(loader(resumed(MaskSamples(str(made / "out"), images=False, seed=5), state), 2))


def spoil(copied: Path) -> None:
    """Image 0 is gone, image 1 another one, in a file as long as the one that was listed."""
    (copied / "images" / "0000.jpg").unlink()
    other, path = io.BytesIO(), copied / "images" / "0001.jpg"
    Image.new("RGB", (96, 96)).save(other, "JPEG")
    path.write_bytes(other.getvalue().ljust(path.stat().st_size, b"\0"))


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_are_gone_or_changed_are_counted_and_skipped(
    copied: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    spoil(copied)
    samples = MaskSamples(str(copied / "out"))
    for _ in range(2):
        assert sorted(ids(loader(samples, workers))) == WITH_MASKS[2:]
        assert samples.skipped == 2
    if not workers:
        assert "image 0 skipped, fetch_failed" in caplog.text
        assert "image 1 skipped, changed: " in caplog.text
        assert "2 images could not be read in this pass" in caplog.text


def test_images_that_are_gone_or_changed_are_kept_without_if_asked_for(copied: Path) -> None:
    spoil(copied)
    samples = MaskSamples(str(copied / "out"), unreadable="keep")
    gone, changed, *others = samples
    assert (gone.image_id, changed.image_id) == (0, 1)
    assert gone.image_3HW is changed.image_3HW is None
    assert len(gone.masks) == 12
    assert str(gone.problem).startswith("fetch_failed: ")
    assert str(changed.problem).endswith("(96, 96) pixels, its masks have (96, 128)")
    assert [sample.problem for sample in others] == [None] * (len(WITH_MASKS) - 2)
    table = MaskTable(str(copied / "out"))
    assert [table[i].problem for i in range(3)] == [gone.problem, changed.problem, None]
    assert table.skipped.images == samples.skipped == 2


def test_an_endless_stream_of_nothing_ends_with_an_error(copied: Path) -> None:
    shutil.rmtree(copied / "images")
    assert ids(MaskSamples(str(copied / "out"))) == []
    with pytest.raises(TrainingDataError, match="no image can be read any more"):
        next(iter(MaskSamples(str(copied / "out"), endless=True)))
    with pytest.raises(SettingsError, match="7 blocks of 64 images, too few for 8 readers"):
        next(iter(MaskSamples(str(copied / "out"), endless=True, rank=0, world_size=8)))


def test_an_unfinished_dataset_is_read_as_far_as_it_goes(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    (copied / "out" / "masks" / "part-00001.parquet").unlink()
    assert ids(MaskSamples(str(copied / "out"))) == [i for i in WITH_MASKS if i not in {2, 3}]
    assert "lacks 1 of 7 shards" in caplog.text
    assert open_masks(str(copied / "out")).count_rows() == IMAGES - 2


def test_a_damaged_shard_is_named(copied: Path) -> None:
    (copied / "out" / "masks" / "part-00001.parquet").write_bytes(b"nothing")
    with pytest.raises(TrainingDataError, match=r"part-00001\.parquet is damaged.*--remove-damaged"):
        list(MaskSamples(str(copied / "out")))


def rewritten(output: Path, change: Callable[[dict[str, Any]], object]) -> str:
    path = output / "run.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    return str(output)


def test_a_newer_schema_is_refused_and_both_versions_named(copied: Path) -> None:
    newer = SCHEMA_VERSION + 1
    output = rewritten(copied / "out", lambda run: run["determinants"]["schema"].update(masks=newer))
    for read in (open_masks, MaskSamples, MaskTable):
        with pytest.raises(SettingsError, match=rf"version {newer} .* up to {SCHEMA_VERSION}"):
            read(output)


def test_what_is_no_masks_dataset_is_refused(copied: Path, tmp_path: Path, bucket: str) -> None:
    with pytest.raises(OutputConflict, match="no run"):
        open_masks(str(tmp_path))
    with pytest.raises(OutputConflict, match="no run"):
        open_masks(f"{bucket}/nothing")
    output = rewritten(copied / "out", lambda run: run["determinants"].update(schema={"embeddings": 1}))
    with pytest.raises(OutputConflict, match="holds no masks but embeddings"):
        open_masks(output)


@pytest.mark.parametrize(
    "arguments", [{"rank": 2, "world_size": 2}, {"rank": -1}, {"read_ahead": 0}, {"blocks_mixed": 0}]
)
def test_settings_that_cannot_be_are_refused(made: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        MaskSamples(str(made / "out"), **arguments)
