"""Images that are begun together have the rows that each would have alone."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from running import decode_here, jpeg, write_jpegs

from pipeline import manifest, outcomes, rle, sources
from pipeline.config import AmgConfig, EmbeddingsConfig, MasksConfig
from pipeline.contents import SECONDS
from pipeline.model import SamModel, load_model
from pipeline.outcomes import READING
from pipeline.predict import content_of
from pipeline.storage import canonical_uri

ALL_MASKS = AmgConfig(points_per_side=2, pred_iou_thresh=-10, stability_score_thresh=0, box_nms_thresh=1)
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> SamModel:
    return load_model(str(tiny_checkpoint), device="cpu")


@pytest.fixture
def encoded(model: SamModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images the encoder was given at once, each time."""
    counts: list[int] = []
    encode_batch = SamModel.encode_batch

    def counted(self: SamModel, images_HW3: Any) -> Any:
        counts.append(len(images_HW3))
        return encode_batch(self, images_HW3)

    monkeypatch.setattr(SamModel, "encode_batch", counted)
    return counts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven images of several sizes, the third and the last of which are broken."""
    folder = write_jpegs(tmp_path / "in", 5)
    (folder / "0001.jpg").write_bytes(jpeg(1, (70, 40)))
    (folder / "0002.jpg").write_bytes(b"no image")
    (folder / "0005.jpg").write_bytes(jpeg(5, (64, 64)))
    (folder / "0006.jpg").write_bytes(jpeg(6)[:700])
    return folder


def rows_made(folder: Path, model: SamModel, kind: str = "masks", begun: list[int] | None = None) -> Rows:
    addresses = {"images": canonical_uri(str(folder)), "output": canonical_uri(str(folder.parent / "out"))}
    config = EmbeddingsConfig(**addresses) if kind == "embeddings" else MasksConfig(**addresses, amg=ALL_MASKS)
    manifest.write_manifest(sources.find_images(config.images, Counter()), config.output, images_per_shard=100)
    rows = manifest.read_shard(config.output, 0)
    heard = [] if begun is None else begun
    content = content_of(config, model)
    made = outcomes.outcomes(
        rows, config, content, decode_here(config), lambda image_id, _: heard.append(image_id)
    )
    return list(made)


def assert_alike(found: Rows, expected: Rows) -> None:
    """Rows differ by rounding only: a batch is summed in another order."""
    assert [row["status"] for row in found] == [row["status"] for row in expected]
    for row, other in zip(found, expected, strict=True):
        assert row.keys() == other.keys()
        for name in row.keys() - {"masks", "embedding", SECONDS, READING}:
            assert row[name] == other[name]
        if row.get("embedding") is not None:
            np.testing.assert_allclose(row["embedding"], other["embedding"], atol=0.01)
        assert len(row.get("masks", ())) == len(other.get("masks", ()))
        for mask, same in zip(row.get("masks", ()), other.get("masks", ()), strict=True):
            assert mask["predicted_iou"] == pytest.approx(same["predicted_iou"], abs=1e-4)
            differing: NDArray[np.bool_] = rle.decode(mask["segmentation"]) != rle.decode(same["segmentation"])
            assert differing.mean() < 0.001


@pytest.mark.parametrize("kind", ["masks", "embeddings"])
@pytest.mark.parametrize("images", [2, 3, 100])
def test_rows_are_those_of_each_image_alone(
    folder: Path, model: SamModel, encoded: list[int], monkeypatch: pytest.MonkeyPatch, *, kind: str, images: int
) -> None:
    expected = rows_made(folder, model, kind)
    assert [row["status"] for row in expected] == ["ok", "ok", "not_an_image", "ok", "ok", "ok", "truncated"]
    assert encoded == [1] * 5
    encoded.clear()
    monkeypatch.setattr(SamModel, "images_per_batch", images)
    assert_alike(rows_made(folder, model, kind), expected)
    assert encoded == {2: [2, 1, 2], 3: [2, 3], 100: [5]}[images]


def test_seconds_of_encoding_are_shared_out(
    folder: Path, model: SamModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SamModel, "images_per_batch", 100)
    made = [row for row in rows_made(folder, model) if row["status"] == "ok"]
    seconds = [row[SECONDS]["encode"] for row in made]
    assert all(0 < each < 60 for each in seconds)
    assert max(seconds) - min(seconds) < 0.5 * max(seconds)  # the first has not borne it all
    assert {"fetch", "decode", "encode", "decode_masks", "post_process"} == made[0][SECONDS].keys()


def test_each_image_is_told_when_waited_for_and_at_its_turn(
    folder: Path, model: SamModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone: list[int] = []
    rows_made(folder, model, begun=alone)
    assert alone == [*range(7)]
    monkeypatch.setattr(SamModel, "images_per_batch", 4)
    together: list[int] = []
    rows_made(folder, model, begun=together)
    assert together == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 4, 5, 6]


def test_images_of_many_pixels_are_begun_alone(
    folder: Path, model: SamModel, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SamModel, "images_per_batch", 100)
    monkeypatch.setattr(outcomes, "_PIXELS_PER_BATCH", 96 * 128 + 1)
    rows_made(folder, model)
    assert encoded == [2, 2, 1]


@pytest.mark.parametrize("kind", ["masks", "embeddings"])
def test_where_memory_does_not_suffice_for_a_batch_images_are_encoded_one_by_one(
    folder: Path, model: SamModel, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    expected = rows_made(folder, model, kind)
    encode_batch = SamModel.encode_batch
    counts: list[int] = []

    def without_memory(self: SamModel, images_HW3: Any) -> Any:
        counts.append(len(images_HW3))
        if len(images_HW3) > 1:
            raise MemoryError
        return encode_batch(self, images_HW3)

    monkeypatch.setattr(SamModel, "images_per_batch", 3)
    monkeypatch.setattr(SamModel, "encode_batch", without_memory)
    assert_alike(rows_made(folder, model, kind), expected)
    assert counts == [2, 1, 1, 1, 1, 1]  # the first three images, one of them broken; then no batch again


def test_any_other_error_of_a_batch_ends_the_shard(
    folder: Path, model: SamModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("a fault of the program")

    monkeypatch.setattr(SamModel, "images_per_batch", 3)
    monkeypatch.setattr(SamModel, "encode_batch", broken)
    with pytest.raises(RuntimeError, match="a fault"):
        rows_made(folder, model)
