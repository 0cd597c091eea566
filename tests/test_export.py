"""Exports hold the masks of their dataset, as the readers of their formats see them, and name what they lack."""

import csv
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from curated_masks import SIZE, curated, make, masks_run, pixels, record
from known_masks import blobs, box
from PIL import Image
from pycocotools import mask as coco
from pycocotools.coco import COCO
from running import call, rows
from torchvision.datasets import CocoDetection

from pipeline import rle
from pipeline.curation.config import StepsConfig
from pipeline.curation.flatten import flattened
from pipeline.export import panoptic
from pipeline.export.config import Format
from pipeline.export.dataset import file_name, own_name
from pipeline.export.labels import labels_of
from pipeline.export.yolo import iou_of, polygon_of
from pipeline.storage import canonical_uri, read_bytes

HEIGHT, WIDTH = SIZE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in `masks`: four images with ragged masks, none, one that failed, and special masks."""
    folder = tmp_path_factory.mktemp("export")
    ragged = [record(mask, 0.9 + i / 100) for i, mask in enumerate(blobs(7, *SIZE))]
    one_pixel, line = box(SIZE, 4, 5, 5, 6), box(SIZE, 10, 10, 11, 60)
    whole = np.ones(SIZE, bool)
    nan = float("nan")
    special = [
        record(whole, 0.95),
        record(one_pixel),
        record(line),
        record(np.zeros(SIZE, bool), stability_score=nan),
    ]
    masks_run(folder, [ragged, [], None, special, ragged[1:3]])
    return folder


def exported(folder: Path, form: Format, *flags: str, code: int = 0) -> dict[str, Any]:
    """Run the command; what export.json says."""
    output = folder / "-".join([form, *flags])
    ended = call("jobs.export_masks", "--input", folder / "masks", "--output", output, "--format", form, *flags)
    assert ended.returncode == code, ended.stderr
    document: dict[str, Any] = json.loads((output / "export.json").read_text())
    for name in document["named"]:
        assert name in ended.stderr
    return document


def with_masks(folder: Path) -> list[dict[str, Any]]:
    return [row for row in rows(folder / "masks") if row["status"] in {"ok", "empty"}]


def test_coco_is_read_by_two_readers_and_has_the_same_masks(folder: Path) -> None:
    document = exported(folder, "coco")
    assert (document["images"], document["masks"], document["state"]) == (4, 13, "complete")
    assert document["left_out"] == {"image truncated": 1}
    assert document["named"] == [f"{canonical_uri(str(folder / 'photos/0002.jpg'))}: image truncated"]
    path = folder / "coco/instances.json"
    reader = COCO(path)
    for row in with_masks(folder):
        found = reader.loadAnns(reader.getAnnIds(imgIds=[row["image_id"]]))
        assert [one["segmentation"] for one in found] == [mask["segmentation"] for mask in row["masks"]]
        assert [one["area"] for one in found] == [mask["area"] for mask in row["masks"]]
        masks_NHW = pixels(row["masks"])
        for one, mask_HW in zip(found, masks_NHW, strict=True):
            assert (reader.annToMask(one) == mask_HW).all()
            assert one["bbox"] == coco.toBbox(one["segmentation"]).tolist()
    assert reader.anns[13]["predicted_iou"] == pytest.approx(0.92)
    assert reader.anns[11]["stability_score"] is None
    other = CocoDetection(str(folder / "photos"), str(path))
    assert [len(annotations) for _, annotations in (other[i] for i in range(len(other)))] == [7, 0, 4, 2]
    assert other[0][0].size == (WIDTH, HEIGHT)


def test_coco_has_the_hierarchy_by_annotation(tmp_path: Path) -> None:
    nested = [record(box(SIZE, 0, 0, size, size)) for size in (10, 20, 30)]
    make(curated(masks_run(tmp_path, [nested, nested]), StepsConfig(hierarchy_thresh=0.9)))
    flags = ("--input", tmp_path / "curated", "--output", tmp_path / "coco", "--format", "coco")
    assert call("jobs.export_masks", *flags).returncode == 0
    annotations = json.loads((tmp_path / "coco/instances.json").read_text())["annotations"]
    assert [one["id"] for one in annotations] == [1, 2, 3, 4, 5, 6]
    assert [one["parent_id"] for one in annotations] == [2, 3, None, 5, 6, None]
    assert [one["depth"] for one in annotations] == [2, 1, 0, 2, 1, 0]


def test_sa1b_has_its_keys_and_the_same_masks(folder: Path) -> None:
    assert exported(folder, "sa1b")["masks"] == 13
    numbers = []
    for row in with_masks(folder):
        document = json.loads((folder / f"sa1b/{row['image_id']:04d}.json").read_text())
        assert document["image"] == {
            "image_id": row["image_id"],
            "width": WIDTH,
            "height": HEIGHT,
            "file_name": f"{row['image_id']:04d}.jpg",
        }
        for mask, annotation in zip(row["masks"], document["annotations"], strict=True):
            numbers.append(annotation.pop("id"))
            if mask["stability_score"] != mask["stability_score"]:
                mask["stability_score"] = None
            assert annotation == mask
    assert numbers == list(range(1, 14))
    assert not (folder / "sa1b/0002.json").exists()


@pytest.mark.parametrize("priority", ["smallest", "best"])
def test_instance_pictures_are_the_flattened_masks(folder: Path, priority: Any) -> None:
    document = exported(folder, "png", "--flatten", priority)
    output = folder / f"png---flatten-{priority}"
    for row in with_masks(folder):
        picture = Image.open(output / f"{row['image_id']:012d}.png")
        assert picture.mode == "I;16"
        flat = flattened(row["masks"], priority)
        for number, mask in enumerate(flat, 1):
            assert (rle.decode(mask["segmentation"]) == (np.array(picture) == number)).all()
        assert np.array(picture).max() <= len(flat)
    index = list(csv.DictReader((output / "images.csv").read_text().splitlines()))
    assert [(line["png"], line["file_name"]) for line in index][3] == ("000000000004.png", "0004.jpg")
    assert document["left_out"]["mask without a pixel of its own"] == (1 if priority == "smallest" else 3)
    assert "image 3, mask 3: mask without a pixel of its own" in document["named"]
    assert document["masks"] == 13 - document["left_out"]["mask without a pixel of its own"]


def test_panoptic_pictures_and_segments_are_the_flattened_masks(folder: Path) -> None:
    assert exported(folder, "panoptic")["masks"] == 12
    document = json.loads((folder / "panoptic/panoptic.json").read_text())
    assert [image["id"] for image in document["images"]] == [0, 1, 3, 4]
    for row, annotation in zip(with_masks(folder), document["annotations"], strict=True):
        assert annotation["image_id"] == row["image_id"]
        rgb = np.array(Image.open(folder / "panoptic/panoptic" / annotation["file_name"])).astype(int)
        ids_HW = rgb[..., 0] + 256 * rgb[..., 1] + 65536 * rgb[..., 2]
        flat = [mask for mask in flattened(row["masks"], "smallest") if mask["area"]]
        for mask, segment in zip(flat, annotation["segments_info"], strict=True):
            assert (rle.decode(mask["segmentation"]) == (ids_HW == segment["id"])).all()
            assert segment["area"] == mask["area"]
        assert set(np.unique(ids_HW)) - {0} == {segment["id"] for segment in annotation["segments_info"]}


def test_labels_above_a_byte_and_above_two_are_kept_apart() -> None:
    masks = [record(np.zeros(SIZE, bool))] * 70_000
    masks[299], masks[69_999] = record(box(SIZE, 0, 0, 5, 5)), record(box(SIZE, 5, 5, 9, 9))
    labels_HW = labels_of(masks, SIZE, np.uint32)
    assert (labels_HW[0, 0], labels_HW[8, 8], labels_HW[9, 9]) == (300, 70_000, 0)


def test_an_image_of_more_masks_than_sixteen_bits_is_left_out_by_name(tmp_path: Path) -> None:
    many = [record(box(SIZE, 0, 0, 1, 1))] * 65_536
    masks_run(tmp_path, [many, [record(np.ones(SIZE, bool))]])
    document = exported(tmp_path, "png")
    assert (document["images"], document["masks"]) == (1, 1)
    assert document["named"] == ["image 0: image of more than 65535 masks"]
    assert not (tmp_path / "png/000000000000.png").exists()


def test_an_image_of_more_masks_than_panoptic_colours_is_left_out_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(panoptic, "_MOST", 2)
    squares = [record(box(SIZE, 0, 10 * i, 9, 10 * i + 9)) for i in range(3)]
    masks_run(tmp_path, [squares, squares[:2]])
    document = exported(tmp_path, "panoptic")
    assert (document["images"], document["masks"]) == (1, 2)
    assert document["left_out"] == {"image of more than 2 masks": 1}
    assert document["named"] == ["image 0: image of more than 2 masks"]
    assert [path.name for path in (tmp_path / "panoptic/panoptic").iterdir()] == ["000000000001.png"]
    written = json.loads((tmp_path / "panoptic/panoptic.json").read_text())
    assert [image["id"] for image in written["images"]] == [1]
    assert [one["image_id"] for one in written["annotations"]] == [1]


def read_yolo(line: str) -> np.ndarray[Any, Any]:
    """A polygon's pixels, as Ultralytics' `polygon2mask` fills them."""
    values = np.array(line.split()[1:], float).reshape(-1, 2) * [WIDTH, HEIGHT]
    canvas = np.zeros(SIZE, np.uint8)
    cv2.fillPoly(canvas, [values.astype(np.int32)], 1)
    return canvas.astype(bool)


@pytest.mark.parametrize("flags", [(), ("--tolerance", "1.5")])
def test_polygons_have_the_iou_that_is_reported(folder: Path, flags: tuple[str, ...]) -> None:
    document = exported(folder, "yolo-seg", *flags)
    output = folder / "-".join(["yolo-seg", *flags])
    lines = csv.reader((output / "iou.csv").read_text().splitlines()[1:])
    table = {(int(image), int(mask)): float(iou) for image, mask, iou in lines}
    written = 0
    for row in with_masks(folder):
        label = (output / f"labels/{row['image_id']:04d}.txt").read_text().splitlines()
        reported = [table[row["image_id"], place] for place in range(len(row["masks"]))]
        drawn = iter(label)
        for mask, iou in zip(row["masks"], reported, strict=True):
            if iou:
                mask_HW, filled_HW = rle.decode(mask["segmentation"]), read_yolo(next(drawn))
                assert iou == pytest.approx((mask_HW & filled_HW).sum() / (mask_HW | filled_HW).sum(), abs=1e-6)
        assert next(drawn, None) is None
        written += len(label)
    assert document["left_out"] == {"image truncated": 1, "mask whose polygon has no area": 3}
    assert [f"image 3, mask {i}: mask whose polygon has no area" for i in (1, 2, 3)] == document["named"][1:]
    assert document["masks"] == written == 10
    assert document["mean_iou"] == pytest.approx(np.mean(list(table.values())), abs=1e-6)
    assert document["least_iou"] == 0
    assert document["below_0.9"] == sum(iou < 0.9 for iou in table.values())


def test_a_polygon_is_the_mask_where_it_has_neither_holes_nor_pieces() -> None:
    whole = box(SIZE, 3, 4, 30, 50) & ~box(SIZE, 3, 20, 20, 30)
    assert iou_of(record(whole), polygon_of(record(whole), 0)) == 1.0
    pieces = box(SIZE, 3, 4, 30, 20) | box(SIZE, 50, 60, 70, 90) | box(SIZE, 80, 2, 90, 9)
    iou = iou_of(record(pieces), polygon_of(record(pieces), 0))
    assert 0.9 < iou < 1  # lines of a pixel's width join them
    ring = box(SIZE, 0, 0, 10, 10) & ~box(SIZE, 3, 3, 6, 6)
    assert iou_of(record(ring), polygon_of(record(ring), 0)) == 91 / 100


def test_data_yaml_is_what_ultralytics_asks_for(folder: Path) -> None:
    exported(folder, "yolo-seg")
    data = yaml.safe_load((folder / "yolo-seg/data.yaml").read_text())
    assert data == {"train": "images", "val": "images", "names": {0: "object"}}


def test_two_images_of_one_label_file_are_named(tmp_path: Path) -> None:
    square = [record(box(SIZE, 0, 0, 9, 9))]
    masks_run(tmp_path, [square, [], square], names=["a.jpg", "a.jpg.jpg", "a.png"])
    document = exported(tmp_path, "yolo-seg")
    assert (document["images"], document["masks"]) == (2, 1)
    assert document["named"] == ["image 2, a.txt: image whose label file another one has"]
    assert sorted(path.name for path in (tmp_path / "yolo-seg/labels").iterdir()) == ["a.jpg.txt", "a.txt"]


def test_the_output_of_another_export_is_refused(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    flags = ("--input", folder / "masks", "--output", output)
    assert call("jobs.export_masks", *flags, "--format", "sa1b").returncode == 0
    assert call("jobs.export_masks", *flags, "--format", "sa1b").returncode == 0
    refused = call("jobs.export_masks", *flags, "--format", "png")
    assert refused.returncode == 2
    assert "another export, which differs in format" in refused.stderr
    into_run = ("--input", folder / "masks", "--output", folder / "masks", "--format", "coco")
    assert call("jobs.export_masks", *into_run).returncode == 2


def test_an_export_goes_to_object_storage(folder: Path, bucket: str) -> None:
    flags = ("--input", folder / "masks", "--output", f"{bucket}/coco", "--format", "coco")
    assert call("jobs.export_masks", *flags).returncode == 0
    exported(folder, "coco")
    assert read_bytes(f"{bucket}/coco/instances.json") == (folder / "coco/instances.json").read_bytes()


@pytest.mark.parametrize(
    ("images", "uri", "name"),
    [
        ("s3://b/photos", "s3://b/photos/a/1.jpg", "a/1.jpg"),
        ("s3://b/2024-*/**/*.jpg", "s3://b/2024-01/x/1.jpg", "2024-01/x/1.jpg"),
        ("s3://b/all.tar", "tar://sa_1.jpg::s3://b/all.tar", "sa_1.jpg"),
        ("s3://b/list.txt", "https://user:secret@host/1.jpg", "https://***@host/1.jpg"),
    ],
)
def test_an_image_is_named_as_it_lies_in_the_input(images: str, uri: str, name: str) -> None:
    assert file_name(uri, images) == name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a/1.jpg", "a/1.json"),
        ("./a.b.jpg", "a.b.json"),
        ("../../1.jpg", "1.json"),
        ("s3://b/a/1.jpg", "b/a/1.json"),
        ("file:///data/1.jpg", "data/1.json"),
        ("parquet://3::s3://b/x.parquet", "b/x.parquet/3.json"),
        ("https://host/1.jpg?signature=***", "7.json"),
    ],
)
def test_a_file_is_named_as_its_image(name: str, expected: str) -> None:
    assert own_name(name, 7, ".json") == expected
