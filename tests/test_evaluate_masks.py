"""`jobs.evaluate_masks`: against COCO's own evaluation, SA-1B, BSDS500, another dataset; and without a truth."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
from known_masks import Mask, blobs, box
from pycocotools import mask as coco
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from running import call, rows
from sa1b_folder import annotation, imported, tarred, write_sa1b

from pipeline import rle
from pipeline.evaluation.distributions import depths

SIZE = (150, 200)


def segments(seed: int) -> list[Mask]:
    """Of all of COCO's sizes."""
    rng = np.random.default_rng(seed)
    found = list(blobs(2, *SIZE, seed=seed))
    for side in (8, 12, 20, 31, 32, 40, 60, 96, 97):
        top, left = int(rng.integers(SIZE[0] - side)), int(rng.integers(SIZE[1] - side))
        found.append(box(SIZE, top, left, top + side, left + side))
    return found


def guesses(wanted: Sequence[Mask], seed: int, each: int = 6) -> list[dict[str, Any]]:
    """Masks that are more or less like the wanted ones, with scores that say little, some alike."""
    rng = np.random.default_rng(seed)
    found = []
    for mask in list(wanted) * each:
        rate = rng.uniform(0, 0.4) * mask.mean()
        noisy = (
            mask ^ (rng.random(SIZE) < rate)
            if rng.random() < 0.7
            else np.roll(mask, rng.integers(1, 9, 2), (0, 1))
        )
        found.append(annotation(noisy, float(rng.integers(60, 99)) / 100))
    return found


@pytest.fixture(scope="module")
def truth() -> dict[str, list[Mask]]:
    return {f"sa_{i}": segments(i) for i in range(3)}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, truth: dict[str, list[Mask]]) -> Path:
    """Masks that are more or less true, of three images; a fourth that failed."""
    folder = tmp_path_factory.mktemp("evaluate")
    found = {name: guesses(masks, seed=i) for i, (name, masks) in enumerate(truth.items())}
    images = write_sa1b(folder / "images", found | {"sa_3": []}, SIZE)
    (images / "sa_3.json").write_text("{")
    return imported(images, folder / "out")


def tables(output: Path, *flags: str | Path) -> dict[str, list[dict[str, Any]]]:
    """The command's tables by title, their rows by column."""
    finished = call("jobs.evaluate_masks", *flags, "--output", output)
    assert finished.returncode == 0, finished.stderr
    document = json.loads(output.read_text())
    for table in document["tables"]:
        assert f"\n## {table['title']}\n" in finished.stdout
    assert "command: `python -m jobs.evaluate_masks" in finished.stdout
    return {
        table["title"]: [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
        for table in document["tables"]
    }


def coco_json(truth: dict[str, list[Mask]], **changed: Any) -> dict[str, Any]:
    annotations = [
        {
            "id": 100 * i + j + 1,
            "image_id": i,
            "category_id": j % 3,
            "iscrowd": 0,
            "area": float(mask.sum()),
            "bbox": coco.toBbox(rle.encode(mask)).tolist(),
            "segmentation": rle.encode(mask),
        }
        for i, masks in enumerate(truth.values())
        for j, mask in enumerate(masks)
    ]
    images = [
        {"id": i, "file_name": f"val/{name}.jpg", "height": SIZE[0], "width": SIZE[1]}
        for i, name in enumerate(truth)
    ]
    return {"images": images, "annotations": annotations, "categories": [{"id": i} for i in range(3)]} | changed


def cocos_own(document: dict[str, Any], dataset: Path, most: list[int]) -> np.ndarray[Any, Any]:
    """Recall by COCOeval without classes: mean over thresholds, sizes x numbers of masks."""
    expected, numbers = COCO(), {Path(image["file_name"]).stem: image["id"] for image in document["images"]}
    expected.dataset = document | {"info": {}}
    expected.createIndex()
    results = [
        {"image_id": numbers[Path(row["uri"]).stem], "category_id": 0, "score": mask["predicted_iou"]}
        | {"segmentation": mask["segmentation"]}
        for row in rows(dataset)
        for mask in row["masks"]
    ]
    evaluation = COCOeval(expected, expected.loadRes(results), "segm")
    evaluation.params.useCats, evaluation.params.maxDets = 0, most
    evaluation.evaluate()
    evaluation.accumulate()
    recall: np.ndarray[Any, Any] = evaluation.eval["recall"][:, 0].mean(axis=0)
    return recall


def test_average_recall_is_cocos(tmp_path: Path, truth: dict[str, list[Mask]], dataset: Path) -> None:
    document = coco_json(truth)
    document["annotations"][3]["iscrowd"] = 1
    document["annotations"][4]["area"] = 2000.0  # as annotated, which is not what its mask has
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(document))
    [table] = tables(tmp_path / "t.json", "--input", dataset, "--truth", path).values()
    expected = cocos_own(document, dataset, [10, 100, 1000])
    assert [row["segments' area"] for row in table] == ["all", "small", "medium", "large"]
    for row, recalls in zip(table, expected, strict=True):
        assert 0 < row["AR@10"] < row["AR@1000"] < 1
        assert [row["AR@10"], row["AR@100"], row["AR@1000"]] == pytest.approx(recalls.tolist())
    assert table[0]["segments"] == 3 * 11 - 1


def test_best_iou_and_boundary_recall(tmp_path: Path) -> None:
    wanted = box(SIZE, 20, 30, 60, 80)
    images = write_sa1b(tmp_path / "images", {"sa_1": [annotation(box(SIZE, 20, 30, 60, 60))]}, SIZE)
    found = imported(images, tmp_path / "out")
    truth = write_sa1b(tmp_path / "truth", {"sa_1": [annotation(wanted)]}, SIZE)
    [table] = tables(tmp_path / "t.json", "--input", found, "--truth", truth).values()
    assert table[0]["best IoU"] == pytest.approx(30 / 50)
    # Of its contour of about 180 pixels, what is farther than 2 pixels from the smaller box is not found.
    assert table[0]["boundary recall"] == pytest.approx((40 + 2 * 32) / 180, abs=0.03)
    [same] = tables(tmp_path / "t.json", "--input", found, "--truth", images).values()
    assert (same[0]["AR@10"], same[0]["best IoU"], same[0]["boundary recall"]) == (1, 1, 1)


@pytest.mark.parametrize("kind", ["folder", "tar", "dataset", "dataset by name"])
def test_truths_say_the_same(tmp_path: Path, truth: dict[str, list[Mask]], dataset: Path, kind: str) -> None:
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(coco_json(truth)))
    [expected] = tables(tmp_path / "t.json", "--input", dataset, "--truth", path).values()
    marked = {name: [annotation(mask) for mask in masks] for name, masks in truth.items()}
    images = dataset.parent / "images" if kind == "dataset" else tmp_path / "truth"
    kept = {path: path.read_bytes() for path in images.glob("*.json")}
    write_sa1b(images, marked, SIZE)
    address = images if kind == "folder" else tarred(images) if kind == "tar" else imported(images, tmp_path / "t")
    for path, data in kept.items():
        path.write_bytes(data)
    [table] = tables(tmp_path / "t.json", "--input", dataset, "--truth", address).values()
    assert table == expected


def test_each_person_of_bsds500_is_asked_for_all_segments(tmp_path: Path) -> None:
    halves, quarters = np.ones(SIZE, np.uint16), np.ones(SIZE, np.uint16)
    halves[:, 100:] = 2
    quarters[75:, :100], quarters[:75, 100:], quarters[75:, 100:] = 2, 3, 4
    people = np.empty((1, 2), dtype=object)
    for i, label_map in enumerate((halves, quarters)):
        people[0, i] = {"Segmentation": label_map}
    (tmp_path / "val").mkdir()
    scipy.io.savemat(tmp_path / "val" / "sa_1.mat", {"groundTruth": people})
    found = [annotation(halves == 1), annotation(halves == 2), annotation(quarters == 1)]
    output = imported(write_sa1b(tmp_path / "images", {"sa_1": found}, SIZE), tmp_path / "out")
    [table] = tables(tmp_path / "t.json", "--input", output, "--truth", tmp_path / "val").values()
    assert table[0]["segments"] == 6
    # One person's both halves, the other's first quarter and, at an IoU of 0.5, one quarter by each half.
    assert table[0]["AR@100"] == pytest.approx((2 + 1 + 2 * 0.1) / 6)


def test_without_truth_it_tells_scores_and_nesting(tmp_path: Path, dataset: Path) -> None:
    masks, nesting = tables(tmp_path / "t.json", "--input", dataset).values()
    stored = [mask for row in rows(dataset) for mask in row["masks"]]
    by_name = {row[""]: row for row in masks}
    assert by_name["masks an image"] | {"mean": 66} == by_name["masks an image"]
    assert by_name["stability score"]["50%"] == pytest.approx(0.97)
    assert by_name["predicted IoU"]["mean"] == pytest.approx(np.mean([mask["predicted_iou"] for mask in stored]))
    assert by_name["share of the image"]["number"] == sum(row["masks"] for row in nesting) == len(stored)
    assert sum(row["share"] for row in nesting) == pytest.approx(1)
    [limited, _] = tables(tmp_path / "t.json", "--input", dataset, "--limit", "1").values()
    assert limited[0]["number"] == 1


def test_depth_counts_the_larger_masks_around() -> None:
    inner, middle, outer = (box(SIZE, *edges) for edges in ((40, 40, 50, 50), (30, 30, 60, 60), (10, 10, 90, 90)))
    across = box(SIZE, 40, 45, 50, 140)
    assert depths([rle.encode(mask) for mask in (outer, inner, middle, across, outer)]).tolist() == [0, 3, 2, 0, 0]
    assert depths([]).tolist() == []
    assert depths([rle.encode(outer)] * 300).tolist() == [0] * 300  # pycocotools measures no more than 255 at once


def test_what_has_no_counterpart_is_counted(tmp_path: Path, truth: dict[str, list[Mask]], dataset: Path) -> None:
    document = coco_json({"elsewhere": [], **truth})
    document["images"][3]["height"] = SIZE[0] + 1
    for one in document["annotations"]:
        if one["image_id"] == 3:
            one["segmentation"] = rle.encode(np.pad(rle.decode(one["segmentation"]), ((0, 1), (0, 0))))
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(document))
    finished = call("jobs.evaluate_masks", "--input", dataset, "--truth", path)
    assert "2 images were measured. 1 are in the dataset only, 1 in the truth only" in finished.stdout.replace(
        "\n", " "
    )
    assert "1 have another size there" in finished.stdout
    path.write_text(json.dumps(coco_json({"elsewhere": []})))
    finished = call("jobs.evaluate_masks", "--input", dataset, "--truth", path)
    assert finished.returncode == 3
    assert "have no image in common" in finished.stderr


def test_a_failed_image_counts_as_one_without_masks(
    tmp_path: Path, truth: dict[str, list[Mask]], dataset: Path
) -> None:
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(coco_json({"sa_3": truth["sa_0"]})))
    [table] = tables(tmp_path / "t.json", "--input", dataset, "--truth", path).values()
    assert (table[0]["segments"], table[0]["AR@1000"], table[0]["best IoU"]) == (11, 0, 0)


def test_polygons_and_uncompressed_runs_are_read(tmp_path: Path) -> None:
    square = box(SIZE, 20, 30, 60, 80)
    polygon = [[30, 20, 80, 20, 80, 60, 30, 60]]
    output = imported(write_sa1b(tmp_path / "images", {"sa_1": [annotation(square)]}, SIZE), tmp_path / "out")
    for segmentation in (polygon, rle.uncompressed(rle.encode(square))):
        document = coco_json({"sa_1": [square]})
        document["annotations"][0]["segmentation"] = segmentation
        (tmp_path / "instances.json").write_text(json.dumps(document))
        flags = ("--input", output, "--truth", tmp_path / "instances.json")
        [table] = tables(tmp_path / "t.json", *flags).values()
        assert table[0]["AR@10"] == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not COCO's JSON"),
        ("[]", "is not COCO's JSON"),
        ('{"images": [{"id": 1}], "annotations": []}', "is not COCO's JSON"),
        ('{"images": [], "annotations": [{"image_id": 3}]}', "is not COCO's JSON"),
        (json.dumps(coco_json({"a/sa_0": [], "b/sa_0": []})), "names two images alike"),
    ],
)
def test_a_truth_that_is_none_is_refused(tmp_path: Path, dataset: Path, text: str, words: str) -> None:
    (tmp_path / "instances.json").write_text(text)
    finished = call("jobs.evaluate_masks", "--input", dataset, "--truth", tmp_path / "instances.json")
    assert finished.returncode == 3
    assert words in finished.stderr


def test_a_truth_of_lvis_is_named_by_its_addresses(
    tmp_path: Path, truth: dict[str, list[Mask]], dataset: Path
) -> None:
    document = coco_json(truth)
    (tmp_path / "coco.json").write_text(json.dumps(document))
    for image in document["images"]:
        image["coco_url"] = "http://images.cocodataset.org/" + image.pop("file_name").replace("val", "val2017")
    (tmp_path / "lvis.json").write_text(json.dumps(document))
    coco_table, lvis_table = (
        tables(tmp_path / "t.json", "--input", dataset, "--truth", tmp_path / f"{name}.json")
        for name in ("coco", "lvis")
    )
    assert lvis_table == coco_table
    [table] = lvis_table.values()
    assert table[0]["segments"] == 3 * 11


def test_damaged_annotations_are_named(tmp_path: Path, truth: dict[str, list[Mask]], dataset: Path) -> None:
    document = coco_json(truth)
    document["annotations"][0]["segmentation"] = {"size": [3, 4], "counts": "0"}
    (tmp_path / "instances.json").write_text(json.dumps(document))
    (tmp_path / "mat").mkdir()
    (tmp_path / "mat" / "sa_0.mat").write_bytes(b"nothing")
    write_sa1b(tmp_path / "sa", {"sa_0": []}, SIZE)
    (tmp_path / "sa" / "sa_0.json").write_text("{}")
    document["annotations"][0]["segmentation"] = {"size": list(SIZE), "counts": "0"}
    (tmp_path / "short.json").write_text(json.dumps(document))
    for path, words in (
        ("instances.json", "sa_0.jpg: an annotation is damaged: ValueError('RLE of [3, 4]"),
        ("short.json", "sa_0.jpg: an annotation is damaged: ValueError('RLE whose runs do not fill its image')"),
        ("mat", "sa_0.mat is no segmentation of BSDS500"),
        ("sa", "sa_0.json: its JSON is damaged"),
    ):
        finished = call("jobs.evaluate_masks", "--input", dataset, "--truth", tmp_path / path)
        assert finished.returncode == 3, finished.stderr
        assert words in finished.stderr


def test_what_cannot_be_measured_is_said_first(tmp_path: Path, dataset: Path) -> None:
    (tmp_path / "empty").mkdir()
    for flags, code, words in (
        (("--input", tmp_path / "empty"), 2, "no run"),
        (("--input", dataset, "--limit", "0"), 2, "must be 1 or more"),
        (("--input", dataset, "--output", "t.csv"), 2, "must end in .md or .json"),
        (("--input", dataset, "--truth", tmp_path / "nowhere"), 3, "nothing is there"),
        (("--input", dataset, "--truth", tmp_path / "empty"), 3, "holds no truth"),
        (("--input", dataset, "--truth", dataset), 3, "is what is to be measured"),
    ):
        finished = call("jobs.evaluate_masks", *flags)
        assert finished.returncode == code, finished.stderr
        assert words in finished.stderr


def test_only_bsds_needs_the_extra_train(tmp_path: Path, dataset: Path, truth: dict[str, list[Mask]]) -> None:
    (tmp_path / "instances.json").write_text(json.dumps(coco_json(truth)))
    (tmp_path / "mat").mkdir()
    (tmp_path / "mat" / "sa_0.mat").write_bytes(b"nothing")
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['scipy', 'skimage', 'huggingface_hub']))\n"
        "from jobs.evaluate_masks import evaluate_masks, run_command\n"
        "run_command(evaluate_masks, 'jobs.evaluate_masks')"
    )
    for flags, expected in (((), 0), (("--truth", "instances.json"), 0), (("--truth", "mat"), 3)):
        words = [sys.executable, "-c", code, "--input", str(dataset), *flags]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == expected, done.stderr
        assert ("need the extra train" in done.stderr) == (expected == 3)
