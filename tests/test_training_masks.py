"""A masks dataset as training examples."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from running import rows
from small_training import masks_dataset

from pipeline.config import AmgConfig
from pipeline.errors import TrainingDataError
from pipeline.training.examples import MASKS
from pipeline.training.masks import MasksSource


def test_a_masks_dataset_gives_its_images_and_masks(tmp_path: Path, tiny_checkpoint: Path) -> None:
    config = masks_dataset(tmp_path, tiny_checkpoint, 5)
    source = MasksSource(config.output)
    rng = np.random.default_rng(0)
    drawn = {example.name: example for example in (source(rng) for _ in range(60))}
    assert {Path(name).name for name in drawn} == {f"000{i}.jpg" for i in range(5)}
    stored = {row["uri"]: row for row in rows(config.output)}
    for name, example in drawn.items():
        [path] = [uri for uri in stored if uri.endswith(Path(name).name)]
        assert np.array_equal(example.rgb_HW3, np.array(Image.open(path.removeprefix("file://"))))
        assert example.masks_NHW.dtype == bool
        assert example.masks_NHW.shape == (12, 96, 128)
        assert example.masks_NHW.sum(axis=(1, 2)).tolist() == [mask["area"] for mask in stored[path]["masks"]]
    with pytest.raises(TrainingDataError, match="no finished shard"):
        (tmp_path / "empty").mkdir()
        for name in ("run.json",):
            (tmp_path / "empty" / name).write_bytes((tmp_path / "out" / name).read_bytes())
        MasksSource(str(tmp_path / "empty"))


def test_images_that_are_not_what_the_masks_are_of_are_counted(
    tmp_path: Path, tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = masks_dataset(tmp_path, tiny_checkpoint, 5)
    images = tmp_path / "images"
    (images / "0001.jpg").unlink()
    listed = (images / "0002.jpg").stat().st_size
    changed = io.BytesIO()
    Image.new("RGB", (96, 96)).save(changed, "JPEG")
    (images / "0002.jpg").write_bytes(changed.getvalue().ljust(listed, b"\0"))  # of the size that was listed
    source = MasksSource(config.output)
    rng = np.random.default_rng(0)
    assert {Path(source(rng).name).name for _ in range(60)} == {"0000.jpg", "0003.jpg", "0004.jpg"}
    assert source.skipped.images == 2
    assert "(96, 96) pixels, its masks have (96, 128)" in caplog.text
    assert "0001.jpg" in caplog.text
    for path in images.iterdir():
        path.unlink()
    with pytest.raises(TrainingDataError, match="give no image with masks; 5 images could not be read"):
        source(rng)


def test_a_masks_datasets_own_limits_hold(tmp_path: Path, tiny_checkpoint: Path) -> None:
    config = masks_dataset(tmp_path, tiny_checkpoint, 2)
    path = tmp_path / "out" / "run.json"
    document = json.loads(path.read_text())
    document["determinants"]["reading"]["max_pixels"] = 96 * 128 - 1
    path.write_text(json.dumps(document))
    with pytest.raises(TrainingDataError, match="2 images could not be read"):
        MasksSource(config.output)(np.random.default_rng(0))


def test_of_many_masks_as_many_are_decoded_as_an_example_has(tmp_path: Path, tiny_checkpoint: Path) -> None:
    amg = AmgConfig(points_per_side=5, pred_iou_thresh=-10, stability_score_thresh=0, box_nms_thresh=1)
    config = masks_dataset(tmp_path, tiny_checkpoint, 1, amg=amg)
    [row] = rows(config.output)
    assert len(row["masks"]) > MASKS
    areas = [mask["area"] for mask in row["masks"]]
    source, rng = MasksSource(config.output), np.random.default_rng(0)
    one, other = source(rng).masks_NHW, source(rng).masks_NHW
    assert len(one) == len(other) == MASKS
    assert set(one.sum(axis=(1, 2)).tolist()) <= set(areas)
    assert not np.array_equal(one, other)


def test_row_groups_are_read_once(tmp_path: Path, tiny_checkpoint: Path) -> None:
    config = masks_dataset(tmp_path, tiny_checkpoint, 3, images_per_shard=3)
    path = tmp_path / "out" / "masks" / "part-00000.parquet"
    pq.write_table(pq.read_table(path), path, row_group_size=2)
    source, rng = MasksSource(config.output), np.random.default_rng(0)
    expected = [source(np.random.default_rng(i)).name for i in range(30)]
    path.unlink()
    assert [source(np.random.default_rng(i)).name for i in range(30)] == expected
    assert len(set(expected)) == 3
    path.write_bytes(b"nothing")
    with pytest.raises(TrainingDataError, match=r"part-00000\.parquet is damaged"):
        MasksSource(config.output)(rng)
