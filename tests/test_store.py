"""The teacher store as training reads it: checked when opened, in disjoint shards, past damage."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from running import make_dataset, write_jpegs

from pipeline.config import AmgConfig, EmbeddingsConfig, MasksConfig
from pipeline.errors import SettingsError, StorageError, TrainingDataError
from pipeline.images import decode_image
from pipeline.model import load_model
from pipeline.sources import fetch
from pipeline.storage import canonical_uri
from pipeline.training.store import (
    Damage,
    Position,
    TeacherStore,
    open_store,
    read_shard,
    read_shards,
    shards_of,
)

IMAGES, PER_SHARD = 14, 6


@pytest.fixture
def output(tmp_path: Path, tiny_checkpoint: Path) -> Path:
    """Embeddings of 14 images in shards of 6, 6 and 2, in row groups of four; image 2 failed."""
    folder = write_jpegs(tmp_path / "in", IMAGES)
    (folder / "0002.jpg").write_bytes(b"")
    config = EmbeddingsConfig(
        images=canonical_uri(str(folder)),
        output=canonical_uri(str(tmp_path / "out")),
        images_per_shard=PER_SHARD,
    )
    make_dataset(config, tiny_checkpoint)
    return tmp_path / "out"


def part(output: Path, shard: int) -> Path:
    return output / "embeddings" / f"part-{shard:05d}.parquet"


def damage_group(output: Path, shard: int, group: int) -> None:
    """Flip one bit of an embedding."""
    path = part(output, shard)
    column = pq.read_metadata(path).row_group(group).column(8)
    data = bytearray(path.read_bytes())
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    path.write_bytes(data)


def test_what_is_read_is_what_the_teacher_makes_of_the_images(output: Path, tiny_checkpoint: Path) -> None:
    store = open_store(str(output))
    teacher = load_model(str(tiny_checkpoint))
    assert (store.images, store.shards, store.shape) == (IMAGES, 3, (256, 4, 4))
    assert (store.weights_sha256, store.architecture) == (teacher.weights_sha256, "mobile_sam")
    found = [stored for shard in range(3) for stored in read_shard(store, shard)]
    assert [stored.image_id for stored in found] == [0, 1, *range(3, IMAGES)]
    for stored in found:
        rgb = decode_image(fetch(stored.ref, max_bytes=store.max_bytes), max_pixels=store.max_pixels)
        encoded = teacher.encode(rgb)
        assert stored.embedding_CGG.dtype == np.float16
        assert np.array_equal(stored.embedding_CGG, encoded.features_1CHW[0].half().numpy())
        assert (stored.original_size, stored.input_size) == (rgb.shape[:2], encoded.input_size)
        assert stored.uri == stored.ref.uri
        assert stored.embedding_CGG.flags.owndata


def test_a_store_is_itself_and_no_other(output: Path) -> None:
    store = open_store(str(output))
    kept = json.loads(json.dumps(store.identity))
    assert open_store(str(output), expect=kept) == store
    for name, value in {
        "weights_sha256": "0" * 64,
        "image_size": 1024,
        "manifest_digest": "1" * 64,
        "fingerprint": "2" * 64,
    }.items():
        assert name in kept
        with pytest.raises(TrainingDataError, match=rf"{name} \({kept[name]} there, {value} expected\)"):
            open_store(str(output), expect=kept | {name: value})
    with pytest.raises(TrainingDataError, match=r"no_such_fact \(None there, 1 expected\)"):
        open_store(str(output), expect={"no_such_fact": 1})


def test_what_is_no_finished_store_is_refused(output: Path, tmp_path: Path, tiny_checkpoint: Path) -> None:
    with pytest.raises(TrainingDataError, match=r"no run\.json.*jobs\.embed_images"):
        open_store(str(tmp_path / "nowhere"))
    part(output, 1).unlink()
    with pytest.raises(TrainingDataError, match="lacks 1 of 3 shards, the first 1"):
        open_store(str(output))
    masks = MasksConfig(
        images=canonical_uri(str(write_jpegs(tmp_path / "one", 1))),
        output=canonical_uri(str(tmp_path / "masks")),
        amg=AmgConfig(points_per_side=1),
    )
    make_dataset(masks, tiny_checkpoint)
    with pytest.raises(TrainingDataError, match="it holds masks"):
        open_store(str(tmp_path / "masks"))


def test_every_rank_reads_shards_of_its_own(output: Path) -> None:
    store = open_store(str(output))
    for world_size in (1, 2, 3, 5):
        taken = [shards_of(store, rank, world_size, seed=0, epoch=0) for rank in range(world_size)]
        assert sorted(shard for shards in taken for shard in shards) == [0, 1, 2]
        assert max(map(len, taken)) - min(map(len, taken)) <= 1
    orders = {tuple(shards_of(store, 0, 1, seed=0, epoch=epoch)) for epoch in range(20)}
    assert len(orders) == 6
    assert shards_of(store, 0, 1, seed=0, epoch=7) == shards_of(store, 0, 1, seed=0, epoch=7)
    with pytest.raises(SettingsError, match="rank 2 of 2"):
        shards_of(store, 2, 2, seed=0, epoch=0)


def test_reading_goes_on_where_it_stopped(output: Path) -> None:
    store = open_store(str(output))
    order = [2, 0, 1]
    whole = [(position, stored.image_id) for position, stored in read_shards(store, order)]
    assert [image_id for _, image_id in whole] == [12, 13, 0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    for index, (position, _) in enumerate(whole):
        start = Position(*json.loads(json.dumps(position)))
        rest = [(behind, stored.image_id) for behind, stored in read_shards(store, order, start=start)]
        assert rest == whole[index + 1 :]


def damage_footer(output: Path) -> None:
    data = bytearray(part(output, 1).read_bytes())
    begin = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    data[begin : begin + 8] = bytes(8)
    part(output, 1).write_bytes(data)


def cut(output: Path) -> None:
    part(output, 1).write_bytes(part(output, 1).read_bytes()[:-9])


@pytest.mark.parametrize(
    ("harm", "shard", "lost"),
    [
        (lambda output: damage_group(output, 0, 0), 0, [0, 1, 2, 3]),
        (lambda output: damage_group(output, 1, 1), 1, [10, 11]),
        (damage_footer, 1, range(6, 12)),
        (cut, 1, range(6, 12)),
        (lambda output: part(output, 1).write_bytes(b""), 1, range(6, 12)),
    ],
)
def test_damage_is_skipped_counted_and_named(
    output: Path,
    caplog: pytest.LogCaptureFixture,
    harm: Callable[[Path], None],
    shard: int,
    lost: list[int],
) -> None:
    store = open_store(str(output))
    before = {stored.image_id for _, stored in read_shards(store, [0, 1, 2])}
    harm(output)
    damages: list[Damage] = []
    after = {stored.image_id for _, stored in read_shards(store, [0, 1, 2], on_damage=damages.append)}
    assert before - after == set(lost) - {2}
    (damage,) = damages
    assert (damage.shard, damage.image_ids) == (shard, tuple(lost))
    assert damage.reason
    with caplog.at_level(logging.WARNING, "everymask"):
        list(read_shard(store, shard))
    assert f"{len(lost)} images of shard {shard} skipped ({', '.join(map(str, lost))})" in caplog.text


def rewrite(output: Path, shard: int, **columns: Any) -> None:
    """Change columns of a shard, given by a function of their values, and keep its footer."""
    path = part(output, shard)
    table = pq.read_table(path)
    footer = {"everymask": pq.read_metadata(path).metadata[b"everymask"]}
    for name, change in columns.items():
        index = table.schema.get_field_index(name)
        values = change(table[name].combine_chunks())
        table = table.set_column(index, table.schema.field(index), values)
    pq.write_table(table.replace_schema_metadata(footer), path)


def test_one_wrong_row_is_skipped_alone(output: Path) -> None:
    store = open_store(str(output))

    def with_nan(embeddings: Any) -> Any:
        tensors = embeddings.to_numpy_ndarray().copy()
        tensors[1, 0, 0, 0] = np.nan
        return type(embeddings).from_numpy_ndarray(tensors).cast(embeddings.type)

    rewrite(output, 1, embedding=with_nan)
    damages: list[Damage] = []
    found = [stored.image_id for stored in read_shard(store, 1, on_damage=damages.append)]
    assert found == [6, 8, 9, 10, 11]
    assert damages == [Damage(1, (7,), "its embedding is not finite")]


def test_a_shard_of_another_place_or_run_is_noticed(output: Path) -> None:
    store = open_store(str(output))
    whole = part(output, 0).read_bytes()
    part(output, 1).write_bytes(whole)
    damages: list[Damage] = []
    assert list(read_shard(store, 1, on_damage=damages.append)) == []
    assert [damage.image_ids for damage in damages] == [(image_id,) for image_id in range(6, 12)]
    assert damages[0].reason == "its row is that of image 0"
    part(output, 1).write_bytes(part(output, 2).read_bytes())
    assert list(read_shard(store, 1, on_damage=damages.append)) == []
    assert damages[-1].image_ids == tuple(range(6, 12))
    other = TeacherStore(**vars(store) | {"fingerprint": "another"})
    with pytest.raises(TrainingDataError, match="of another run"):
        list(read_shard(other, 0))
    part(output, 1).unlink()
    with pytest.raises(StorageError, match="part-00001"):
        list(read_shard(store, 1))
