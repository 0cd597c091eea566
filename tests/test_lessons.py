"""A teacher store as lessons: pixels, order, workers, and what cannot be read."""

import io
import logging
import re
from contextlib import closing
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from seeded import PHOTOGRAPHS
from small_distillation import (
    IMAGES,
    PER_SHARD,
    SIZE,
    config_for,
    ids,
    lessons,
    order_of,
    same,
)

from pipeline.errors import SettingsError, StorageError, TrainingDataError
from pipeline.model import load_model
from pipeline.model.sam import resized
from pipeline.model.weights import (
    seeded_model,
)
from pipeline.training.decoupled import Lessons
from pipeline.training.lessons import LessonReader


def test_pixels_are_exactly_those_of_the_model() -> None:
    model = seeded_model(0, SIZE)
    for name in ("portrait", "coffee", "square", "small"):
        rgb = PHOTOGRAPHS[name]()
        small = resized(rgb, SIZE)
        height, width = small.shape[:2]
        pixels = np.full((3, SIZE, SIZE), 7, np.uint8)  # what stands in the padding does not matter
        pixels[:, :height, :width] = small.transpose(2, 0, 1)
        batch = Lessons(
            (name,), torch.from_numpy(pixels)[None], torch.tensor([[height, width]]), torch.zeros(1, 256, 4, 4)
        )
        expected, size = model.preprocess(rgb)
        assert size == (height, width)
        assert torch.equal(batch.inputs_B3SS, expected)


def test_lessons_are_the_pictures_and_what_the_teacher_makes_of_them(shared: Path, teacher: Path) -> None:
    model = load_model(str(teacher), "cpu")
    (batch,) = lessons(order_of(shared, batch_size=22, shards_mixed=6), 1)
    assert sorted(ids([batch])[0]) == list(range(IMAGES))
    for i, image_id in enumerate(ids([batch])[0]):
        picture = np.array(Image.open(shared.parent / "store-pictures" / f"{image_id:03d}.png"))
        pixels, size = model.preprocess(picture)
        assert torch.equal(batch.inputs_B3SS[i], pixels[0])
        assert batch.input_sizes_B2[i].tolist() == list(size)
        assert torch.equal(batch.targets_BCGG[i], model.encode(picture).features_1CHW[0].half())
    assert len({tuple(size) for size in batch.input_sizes_B2.tolist()}) == 3


def test_an_epoch_shows_each_picture_once_in_another_order(shared: Path) -> None:
    order = order_of(shared, batch_size=2)
    assert order.steps_per_epoch == 11
    seen = [
        [image_id for batch in ids(lessons(order, 11, 11 * epoch)) for image_id in batch] for epoch in range(3)
    ]
    for epoch in seen:
        assert sorted(epoch) == list(range(IMAGES))
    assert len({tuple(epoch) for epoch in seen}) == 3
    other = ids(lessons(order_of(shared, batch_size=2, seed=1), 11))
    assert [image_id for batch in other for image_id in batch] != seen[0]


def test_shards_are_mixed_and_shuffled(shared: Path) -> None:
    def shards_in_order(mixed: int) -> list[int]:
        order = order_of(shared, batch_size=1, shards_mixed=mixed)
        return [batch[0] // PER_SHARD for batch in ids(lessons(order, IMAGES))]

    alone, mixed = shards_in_order(1), shards_in_order(3)
    assert sum(a != b for a, b in pairwise(alone)) == 5  # one shard after another
    assert alone != sorted(alone)
    assert sum(a != b for a, b in pairwise(mixed)) > 8
    rows = [batch[0] % PER_SHARD for batch in ids(lessons(order_of(shared, batch_size=1, shards_mixed=1), 8))]
    assert rows != [0, 1, 2, 3] * 2


def test_a_batch_follows_from_its_number(shared: Path) -> None:
    order = order_of(shared)
    whole = lessons(order, 13)
    for first in (1, 4, 5, 12):
        for read_ahead in (1, 40):
            later = lessons(order, 13 - first, first, read_ahead=read_ahead)
            assert all(same(a, b) for a, b in zip(whole[first:], later, strict=True))


def test_the_same_shards_are_shuffled_otherwise_in_each_epoch(shared: Path) -> None:
    reader = LessonReader(order_of(shared), 0, read_ahead=3, shards=lambda _epoch: [2])
    with closing(reader.batches(0)) as batches:
        seen = ids(list(islice(batches, 20)))
    assert all(sorted(batch) == [8, 9, 10, 11] for batch in seen)  # begun again five times an epoch
    assert len({tuple(batch) for batch in seen[::5]}) > 1


def test_workers_share_an_epoch(shared: Path) -> None:
    order = order_of(shared, batch_size=4, workers=2)
    assert order.share == 2
    for epoch in range(3):
        steps = order.steps_per_epoch
        seen = [
            [image_id for batch in ids(lessons(order, steps, epoch * steps, rank)) for image_id in batch]
            for rank in range(2)
        ]
        assert not set(seen[0]) & set(seen[1])
        assert [len(part) for part in seen] == [10, 10]
        for rank, part in enumerate(seen):
            assert {image_id // PER_SHARD for image_id in part} <= set(order.shards(rank, epoch))
    with pytest.raises(SettingsError, match="6 shards, too few for 7 workers"):
        order_of(shared, batch_size=7, workers=7)
    with pytest.raises(ValidationError, match="a batch of 8 cannot be divided by 3 workers"):
        config_for(shared, Path("out"), batch_size=8, num_workers=3)


def test_a_worker_with_few_pictures_begins_again(shared: Path) -> None:
    """Six workers, six shards: one of them has two pictures, the others four."""
    order = order_of(shared, batch_size=6, workers=6)
    steps = order.steps_per_epoch
    assert steps == 3
    seen = [[batch[0] for batch in ids(lessons(order, steps, 0, rank))] for rank in range(6)]
    assert sorted(len(set(part)) for part in seen) == [2, 3, 3, 3, 3, 3]


def poison(store: Path, shard: int, row: int) -> None:
    """Make one embedding of the store not finite; checksums are right."""
    path = store / "embeddings" / f"part-{shard:05d}.parquet"
    table = pq.read_table(path)
    footer = {"everymask": pq.read_metadata(path).metadata[b"everymask"]}
    column = table["embedding"].combine_chunks()
    tensors = column.to_numpy_ndarray().copy()
    tensors[row, 0, 0, 0] = np.nan
    index = table.schema.get_field_index("embedding")
    changed = type(column).from_numpy_ndarray(tensors).cast(column.type)
    table = table.set_column(index, table.schema.field(index), changed)
    pq.write_table(table.replace_schema_metadata(footer), path)


def test_what_cannot_be_read_is_left_out_counted_and_named_once(
    store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pictures = store.parent / "store-pictures"
    before = ids(lessons(order_of(store), 10))
    poison(store, 1, 2)  # image 6
    (pictures / "009.png").unlink()
    (pictures / "014.png").write_bytes((pictures / "014.png").read_bytes()[:-20])
    Image.new("RGB", (40, 40)).save(pictures / "020.bmp")
    (pictures / "020.bmp").rename(pictures / "020.png")
    lost = {6, 9, 14, 20}
    reader = LessonReader(order_of(store), 0, read_ahead=3)
    with caplog.at_level(logging.WARNING, "everymask"), closing(reader.batches(0)) as batches:
        after = ids(list(islice(batches, 10)))
    assert reader.skipped.images == 4
    for image_id in (9, 14, 20):
        assert len(re.findall(rf"image {image_id} skipped, \w+: .*{image_id:03d}\.png", caplog.text)) == 1
    assert caplog.text.count("1 images of shard 1 skipped (6): its embedding is not finite") == 1
    assert len(caplog.records) == 4
    assert all(len(batch) == 4 and not set(batch) & lost for batch in after)
    for a, b in zip(before, after, strict=True):
        assert [image_id for image_id in a if image_id not in lost] == b[: len(set(a) - lost)]
    assert ids(lessons(order_of(store), 4, 3)) == after[3:7]


def test_a_picture_of_another_size_is_not_the_teachers(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    picture = store.parent / "store-pictures" / "000.png"
    size = picture.stat().st_size
    buffer = io.BytesIO()
    Image.new("RGB", (48, 48)).save(buffer, "PNG")
    picture.write_bytes(buffer.getvalue() + bytes(size - len(buffer.getvalue())))
    batches = lessons(order_of(store, batch_size=2), 22)
    assert 0 not in {image_id for batch in ids(batches) for image_id in batch}
    assert "(48, 48) pixels, the teacher saw (96, 96)" in caplog.text


def test_where_nothing_can_be_read_the_training_ends(store: Path, tmp_path: Path) -> None:
    (store.parent / "store-pictures").rename(store.parent / "elsewhere")
    with pytest.raises(TrainingDataError, match=r"100 pictures failed one after another, lastly: .*\.png"):
        lessons(order_of(store), 1)
    (store.parent / "elsewhere").rename(store.parent / "store-pictures")
    for shard in range(6):
        path = store / "embeddings" / f"part-{shard:05d}.parquet"
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(TrainingDataError, match=r"There is no picture in .*store to learn from"):
        lessons(order_of(store), 1)
    order = order_of(store)
    (store / "embeddings" / "part-00002.parquet").unlink()
    with pytest.raises(StorageError, match="part-00002"):
        lessons(order, 1)
