"""One shard, without Ray: every image has its row, and the file is what the schema says."""

import dataclasses
import io
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import ExifTags, Image
from running import decode_here, jpeg, rows, write_jpegs

from pipeline import manifest, rle, shard, sources
from pipeline.amg import MaskGenerator
from pipeline.config import AmgConfig, EmbeddedImagesConfig, EmbeddingsConfig, ImagesConfig, MasksConfig
from pipeline.contents import rows_of
from pipeline.images import decode_image
from pipeline.model import SamModel, load_model
from pipeline.predict import content_of, masks_content
from pipeline.shard import ImageDone, make_shard, read_footer
from pipeline.storage import canonical_uri
from pipeline.verify import faults_of_shard
from schemas.embeddings import embeddings_schema
from schemas.masks import MASKS_SCHEMA

ALL_MASKS = AmgConfig(points_per_side=2, pred_iou_thresh=-10, stability_score_thresh=0, box_nms_thresh=1)
PROVENANCE = {"fingerprint": "f", "determinants": {"weights_sha256": "w", "image_size": 64}}


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> SamModel:
    return load_model(str(tiny_checkpoint))


def shard_of(folder: Path, output: Path, model: SamModel, **reading: Any) -> list[dict[str, Any]]:
    """List a folder, make its only shard, and read its rows."""
    config = MasksConfig(
        images=canonical_uri(str(folder)),
        output=canonical_uri(str(output)),
        amg=ALL_MASKS,
        reading=ImagesConfig(**reading),
    )
    manifest.write_manifest(sources.find_images(config.images, Counter()), config.output, images_per_shard=1000)
    make_shard(0, config, content_of(config, model), decode_here(config), PROVENANCE)
    return rows(output)


def test_a_row_holds_what_the_generator_returns(tmp_path: Path, model: SamModel) -> None:
    folder = write_jpegs(tmp_path / "in", 3)
    found = shard_of(folder, tmp_path / "out", model)
    for index, row in enumerate(found):
        rgb = decode_image(jpeg(index), max_pixels=10**6)
        expected = MaskGenerator(model, **ALL_MASKS.model_dump()).generate(rgb)
        assert (row["image_id"], row["status"], row["error"]) == (index, "ok", None)
        assert row["uri"] == canonical_uri(str(folder / f"{index:04d}.jpg"))
        assert (row["height"], row["width"]) == rgb.shape[:2]
        assert len(expected) == 12
        for mask, reference in zip(row["masks"], expected, strict=True):
            for score in ("predicted_iou", "stability_score"):  # float32 in the file
                assert np.float32(mask.pop(score)) == pytest.approx(reference.pop(score), nan_ok=True)
            assert mask == reference


def test_every_bad_image_is_a_row_among_good_ones(tmp_path: Path, model: SamModel) -> None:
    folder = write_jpegs(tmp_path / "in", 2)
    (folder / "a-empty.jpg").write_bytes(b"")
    (folder / "b-cut.jpg").write_bytes(jpeg(5)[:900])
    (folder / "c-text.jpg").write_bytes(b"<html>404</html>")
    (folder / "d-large.jpg").write_bytes(jpeg(6, (200, 300)))
    found = shard_of(folder, tmp_path / "out", model, max_pixels=128 * 96)
    assert [row["status"] for row in found] == ["ok", "ok", "empty_file", "truncated", "not_an_image", "too_large"]
    for row in found[2:]:
        assert row["error"] and row["masks"] == []
        assert row["height"] is None


def out_of_memory(how: str) -> None:
    """Ask for more than there is."""
    if how == "device":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    if how == "torch":
        torch.empty(2**60, dtype=torch.uint8)
    np.empty(2**60, dtype=np.uint8)


@pytest.mark.parametrize("kind", ["masks", "embeddings"])
@pytest.mark.parametrize("how", ["device", "torch", "numpy"])
def test_case_38_an_image_for_which_memory_does_not_suffice_is_a_row(
    tmp_path: Path, model: SamModel, kind: str, how: str
) -> None:
    addresses = {"images": canonical_uri(str(write_jpegs(tmp_path / "in", 3))), "output": f"file://{tmp_path}/out"}
    config = EmbeddingsConfig(**addresses) if kind == "embeddings" else MasksConfig(**addresses, amg=ALL_MASKS)
    manifest.write_manifest(sources.find_images(config.images, Counter()), config.output, images_per_shard=9)
    content = content_of(config, model)
    shown: list[int] = []

    def of_image(rgb_HW3: Any) -> dict[str, Any]:
        shown.append(1)
        if len(shown) == 2:
            out_of_memory(how)
        return content.of_image(rgb_HW3)

    make_shard(0, config, dataclasses.replace(content, of_image=of_image), decode_here(config), PROVENANCE)
    found = rows_of(pq.read_table(tmp_path / "out" / kind))
    assert [row["status"] for row in found] == ["ok", "out_of_memory", "ok"]
    assert "no memory for this image" in found[1]["error"]
    assert (found[1]["height"], found[1]["width"]) == (96, 128)
    assert not found[1]["masks" if kind == "masks" else "embedding"]


def test_any_other_error_ends_the_shard(tmp_path: Path, model: SamModel) -> None:
    folder = write_jpegs(tmp_path / "in", 1)
    config = MasksConfig(images=canonical_uri(str(folder)), output=canonical_uri(str(tmp_path / "out")))
    manifest.write_manifest(sources.find_images(config.images, Counter()), config.output, images_per_shard=9)

    def of_image(rgb_HW3: Any) -> dict[str, Any]:
        raise RuntimeError("a fault of the program")

    with pytest.raises(RuntimeError, match="a fault"):
        make_shard(
            0,
            config,
            dataclasses.replace(content_of(config, model), of_image=of_image),
            decode_here(config),
            PROVENANCE,
        )
    assert not (tmp_path / "out" / "masks").exists()


def test_a_shard_past_the_limit_is_made_in_a_temporary_file(
    tmp_path: Path, model: SamModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_jpegs(tmp_path / "in", 3)
    in_memory = shard_of(folder, tmp_path / "a", model)
    monkeypatch.setattr(shard, "_IN_MEMORY_BYTES", 100)
    assert shard_of(folder, tmp_path / "b", model) == in_memory
    _, summary = read_footer(canonical_uri(str(tmp_path / "b")), "masks", 0)
    assert summary.bytes == (tmp_path / "b" / "masks" / "part-00000.parquet").stat().st_size
    # Where there is no place for it, it is missed.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    config = MasksConfig(images=canonical_uri(str(folder)), output=canonical_uri(str(tmp_path / "b")))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        make_shard(0, config, content_of(config, model), decode_here(config), PROVENANCE)


def test_case_06_a_picture_in_eight_orientations_has_the_same_masks(tmp_path: Path, model: SamModel) -> None:
    upright = Image.open(io.BytesIO(jpeg(4, (90, 140))))
    stored = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }
    folder = tmp_path / "in"
    folder.mkdir()
    for orientation, picture in stored.items():
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        picture.save(folder / f"{orientation}.png", exif=exif)
    first, *others = shard_of(folder, tmp_path / "out", model)
    assert (first["status"], first["height"], first["width"], len(first["masks"])) == ("ok", 90, 140, 12)
    assert len(others) == 7
    for row in others:
        assert row | {"image_id": 0, "uri": first["uri"]} == first


def test_case_04_a_png_named_jpg_is_processed(tmp_path: Path, model: SamModel) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    Image.open(io.BytesIO(jpeg(0))).save(folder / "a.png")
    (folder / "a.png").rename(folder / "a.jpg")
    [row] = shard_of(folder, tmp_path / "out", model)
    assert (row["status"], len(row["masks"])) == ("ok", 12)


def test_case_16_slivers_and_one_colour_are_rows(tmp_path: Path, model: SamModel) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    sizes = [(1, 1), (1, 5000), (5000, 1), (64, 64), (97, 31)]  # width, height
    for index, size in enumerate(sizes):
        Image.new("RGB", size, (90, 120, 30)).save(folder / f"{index}.png")
    found = shard_of(folder, tmp_path / "out", model)
    assert [(row["width"], row["height"]) for row in found] == sizes
    assert {row["status"] for row in found} <= {"ok", "empty"}
    assert faults_of_shard(canonical_uri(str(tmp_path / "out")), "masks", "f", 0) == []


def test_case_24_one_object_that_cannot_be_fetched_is_a_row(tmp_path: Path, model: SamModel) -> None:
    folder = write_jpegs(tmp_path / "in", 2)
    (tmp_path / "list.txt").write_text("in/0000.jpg\nin/gone.jpg\nin/0001.jpg\n")
    found = shard_of(tmp_path / "list.txt", tmp_path / "out", model)
    assert {Path(row["uri"]).name: row["status"] for row in found} == {
        "0000.jpg": "ok",
        "0001.jpg": "ok",
        "gone.jpg": "fetch_failed",
    }
    assert "gone.jpg" in next(row["error"] for row in found if row["error"])
    assert folder.exists()


def test_no_mask_over_the_thresholds_is_empty(tmp_path: Path, model: SamModel) -> None:
    folder = write_jpegs(tmp_path / "in", 1)
    config = MasksConfig(images=canonical_uri(str(folder)), output=canonical_uri(str(tmp_path / "out")))
    manifest.write_manifest(sources.find_images(config.images, Counter()), config.output, images_per_shard=9)
    generator = MaskGenerator(model, points_per_side=2, pred_iou_thresh=1)
    summary = make_shard(0, config, masks_content(generator), decode_here(config), PROVENANCE)
    assert summary.statuses == {"empty": 1}
    assert rows(tmp_path / "out")[0]["status"] == "empty"


def test_the_footer_tells_where_the_rows_come_from(tmp_path: Path, model: SamModel) -> None:
    output = tmp_path / "out"
    shard_of(write_jpegs(tmp_path / "in", 2), output, model)
    footer, summary = read_footer(canonical_uri(str(output)), "masks", 0)
    assert footer == PROVENANCE
    path = output / "masks" / "part-00000.parquet"
    assert (summary.images, summary.masks, summary.statuses) == (2, 24, {"ok": 2})
    assert summary.bytes == path.stat().st_size
    parquet = pq.ParquetFile(path)
    assert parquet.schema_arrow.equals(MASKS_SCHEMA)
    assert parquet.metadata.row_group(0).column(0).compression == "ZSTD"
    assert json.loads(parquet.metadata.metadata[b"everymask"])["summary"]["shard"] == 0
    assert dataclasses.asdict(summary)["shard"] == 0


def test_rows_do_not_depend_on_threads(tmp_path: Path, model: SamModel) -> None:
    folder = write_jpegs(tmp_path / "in", 6)
    one = shard_of(folder, tmp_path / "one", model, read_ahead=1)
    many = shard_of(folder, tmp_path / "many", model, read_ahead=32)
    assert one == many


def test_progress_is_told_before_and_after_each_image(tmp_path: Path, model: SamModel) -> None:
    folder = write_jpegs(tmp_path / "in", 2)
    (folder / "broken.jpg").write_bytes(b"x")
    config = MasksConfig(
        images=canonical_uri(str(folder)), output=canonical_uri(str(tmp_path / "out")), amg=ALL_MASKS
    )
    manifest.write_manifest(sources.find_images(config.images, Counter()), config.output, images_per_shard=9)
    begun: list[tuple[int, tuple[int, str]]] = []
    told: list[ImageDone] = []
    make_shard(
        0,
        config,
        content_of(config, model),
        decode_here(config),
        PROVENANCE,
        on_begin=lambda *image: begun.append((len(told), image)),
        on_image=told.append,
    )
    uris = [(folder / name).as_uri() for name in ("0000.jpg", "0001.jpg", "broken.jpg")]
    assert begun == list(enumerate(enumerate(uris)))
    assert [image.uri for image in told] == uris
    assert [(image.image_id, image.status, image.masks, image.failed) for image in told] == [
        (0, "ok", 12, False),
        (1, "ok", 12, False),
        (2, "not_an_image", 0, True),
    ]
    sizes = [path.stat().st_size for path in sorted(folder.iterdir())]
    assert [image.reading.bytes for image in told if image.reading] == sizes


def test_rle_in_a_row_decodes_to_its_area_and_size(tmp_path: Path, model: SamModel) -> None:
    found = shard_of(write_jpegs(tmp_path / "in", 1), tmp_path / "out", model)
    for mask in found[0]["masks"]:
        pixels = rle.decode(mask["segmentation"])
        assert pixels.shape == (96, 128)
        assert pixels.sum() == mask["area"]


def embedded(folder: Path, output: Path, model: SamModel, **reading: Any) -> pa.Table:
    """List a folder, embed its only shard, and read it with pyarrow alone."""
    config = EmbeddingsConfig(
        images=canonical_uri(str(folder)),
        output=canonical_uri(str(output)),
        reading=EmbeddedImagesConfig(**reading),
    )
    manifest.write_manifest(sources.find_images(config.images, Counter()), config.output, images_per_shard=1000)
    make_shard(0, config, content_of(config, model), decode_here(config), PROVENANCE)
    return pq.read_table(output / "embeddings" / "part-00000.parquet")


def test_an_embedding_is_the_encoders_in_float16(tmp_path: Path, model: SamModel) -> None:
    folder = write_jpegs(tmp_path / "in", 5)
    (folder / "0006.jpg").write_bytes(jpeg(6, (101, 40)))
    table = embedded(folder, tmp_path / "out", model)
    assert table.schema.equals(embeddings_schema(64))
    tensors = table["embedding"].combine_chunks().to_numpy_ndarray()
    assert (tensors.dtype, tensors.shape) == (np.float16, (6, 256, 4, 4))
    for path, row, tensor in zip(sorted(folder.iterdir()), rows_of(table), tensors, strict=True):
        expected = model.encode(decode_image(path.read_bytes(), max_pixels=10**6))
        assert np.array_equal(tensor, expected.features_1CHW[0].numpy().astype(np.float16)), path
        assert np.array_equal(row["embedding"], tensor)
        assert (row["height"], row["width"]) == expected.original_size
        assert (row["input_height"], row["input_width"]) == expected.input_size
        assert (row["status"], row["error"]) == ("ok", None)


def test_an_image_without_embedding_is_a_row(tmp_path: Path, model: SamModel) -> None:
    folder = write_jpegs(tmp_path / "in", 2)
    (folder / "a-empty.jpg").write_bytes(b"")
    (folder / "b-long.jpg").write_bytes(jpeg(5) + bytes(100_000))
    found = rows_of(embedded(folder, tmp_path / "out", model, max_bytes=50_000))
    assert [row["status"] for row in found] == ["ok", "ok", "empty_file", "too_large"]
    for row in found[2:]:
        assert row["error"]
        assert {row[name] for name in ("height", "width", "input_height", "input_width", "embedding")} == {None}


def test_an_embedding_beyond_float16_is_a_row(tmp_path: Path, tiny_checkpoint: Path) -> None:
    loud = load_model(str(tiny_checkpoint))
    with torch.no_grad():
        for parameter in list(loud.image_encoder.parameters())[-2:]:  # of the last normalisation
            parameter.fill_(1e5)
    (row,) = rows_of(embedded(write_jpegs(tmp_path / "in", 1), tmp_path / "out", loud))
    assert (row["status"], row["embedding"], row["height"]) == ("unsupported", None, 96)
    assert "float16" in row["error"]


def test_embeddings_are_stored_in_small_checked_groups(tmp_path: Path, model: SamModel) -> None:
    output = tmp_path / "out"
    embedded(write_jpegs(tmp_path / "in", 6), output, model)
    footer, summary = read_footer(canonical_uri(str(output)), "embeddings", 0)
    assert footer == PROVENANCE
    assert (summary.images, summary.masks, summary.statuses) == (6, 0, {"ok": 6})
    metadata = pq.read_metadata(output / "embeddings" / "part-00000.parquet")
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [4, 2]
    column = metadata.row_group(0).column(8)
    assert (column.compression, "BYTE_STREAM_SPLIT" in column.encodings) == ("ZSTD", True)
