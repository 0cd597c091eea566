"""What is exported finds its images again: imported as SA-1B, and as the truth of its own dataset."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
from curated_masks import SIZE, masks_run, record
from known_masks import Mask, box
from running import call, rows
from sa1b_folder import annotation, imported, tarred, write_sa1b

from pipeline.errors import TrainingDataError
from pipeline.evaluation.matching import Named, matched


def two(seed: int) -> list[Mask]:
    """Distinct masks, other ones for every seed."""
    return [box(SIZE, seed, 2, seed + 20, 40), box(SIZE, 50, 3 * seed, 90, 3 * seed + 30)]


def written(folder: Path, names: list[str]) -> Path:
    """Images in folders, each with its JSON and with masks of its own."""
    for seed, name in enumerate(names):
        path = folder / name
        write_sa1b(path.parent, {path.name: [annotation(mask) for mask in two(seed)]}, SIZE)
    return folder


def exported(dataset: Path, output: Path, form: str = "sa1b") -> dict[str, Any]:
    ended = call("jobs.export_masks", "--input", dataset, "--output", output, "--format", form)
    assert ended.returncode == 0, ended.stderr
    document: dict[str, Any] = json.loads((output / "export.json").read_text())
    return document


def measured(dataset: Path, truth: Path, folder: Path) -> dict[str, Any]:
    """The row of all segments, with the sentence that counts images."""
    flags = ("--input", dataset, "--truth", truth, "--output", folder / "t.json")
    ended = call("jobs.evaluate_masks", *flags)
    assert ended.returncode == 0, ended.stderr
    [table] = json.loads((folder / "t.json").read_text())["tables"]
    return dict(zip(table["columns"], table["rows"][0], strict=True)) | {"said": ended.stdout.replace("\n", " ")}


def assert_all_found(row: dict[str, Any], images: int, segments: int) -> None:
    assert (row["segments"], row["AR@1000"], row["best IoU"]) == (segments, 1.0, 1.0)
    assert f"{images} images were measured. 0 are in the dataset only, 0 in the truth only" in row["said"]


NAMES = ["sa_1", "sa_2", "sa_3", "sa_4"]


def test_an_export_of_sa1b_is_imported_again(tmp_path: Path) -> None:
    dataset = imported(written(tmp_path / "images", [*NAMES, "more/sa_1"]), tmp_path / "out")
    assert exported(dataset, tmp_path / "sa1b")["images"] == 5
    files = {str(path.relative_to(tmp_path / "sa1b")) for path in (tmp_path / "sa1b").rglob("*.json")}
    assert files == {f"{name}.json" for name in [*NAMES, "more/sa_1", "export"]}
    for path in (tmp_path / "images").rglob("*.json"):
        path.unlink()
    shutil.copytree(tmp_path / "sa1b", tmp_path / "images", dirs_exist_ok=True)
    assert rows(imported(tmp_path / "images", tmp_path / "again")) == rows(dataset)


@pytest.mark.parametrize("names", [NAMES, ["a/1", "b/1"], ["1", "a/1", "b/a/1", "b/2"], ["a/a/1", "a/1", "1"]])
@pytest.mark.parametrize("form", ["coco", "sa1b", "tar"])
def test_a_dataset_is_found_whole_by_its_own_export(tmp_path: Path, names: list[str], form: str) -> None:
    dataset = imported(written(tmp_path / "a", names), tmp_path / "out")
    exported(dataset, tmp_path / "export", "coco" if form == "coco" else "sa1b")
    truth = tmp_path / "export/instances.json" if form == "coco" else tmp_path / "export"
    row = measured(dataset, tarred(truth) if form == "tar" else truth, tmp_path)
    assert_all_found(row, len(names), 2 * len(names))


def test_a_list_of_images_is_found_by_its_own_export(tmp_path: Path) -> None:
    images = written(tmp_path / "images", ["a/1", "b/1", "b/0"])
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in sorted(images.rglob("*.jpg"))))
    dataset = imported(tmp_path / "list.txt", tmp_path / "out")
    for form, truth in (("sa1b", "sa1b"), ("coco", "coco/instances.json")):
        exported(dataset, tmp_path / form, form)
        assert_all_found(measured(dataset, tmp_path / truth, tmp_path), 3, 6)
    assert (tmp_path / f"sa1b{images}/b/1.json").exists()


def test_names_that_are_taken_are_left_out_by_name(tmp_path: Path) -> None:
    square = [record(box(SIZE, 0, 0, 9, 9))]
    masks_run(tmp_path, [square, square * 2, square, square], names=["a.jpg", "a.png", "b.jpg", "export.jpg"])
    document = exported(tmp_path / "masks", tmp_path / "sa1b")
    assert (document["images"], document["masks"]) == (2, 2)
    taken = "image whose file's name is taken"
    assert document["left_out"] == {taken: 2}
    assert document["named"] == [f"image 1, a.json: {taken}", f"image 3, export.json: {taken}"]
    found = json.loads((tmp_path / "sa1b/b.json").read_text())
    assert [one["id"] for one in found["annotations"]] == [2]


def test_files_of_people_in_several_folders_are_told_apart(tmp_path: Path) -> None:
    dataset = imported(written(tmp_path / "images", ["train/1", "val/1"]), tmp_path / "out")
    for name, column in (("train", 50), ("val", 90)):
        people = np.empty((1, 1), dtype=object)
        label_map = np.ones(SIZE, np.uint16)
        label_map[:, column:] = 2
        people[0, 0] = {"Segmentation": label_map}
        (tmp_path / "truth" / name).mkdir(parents=True)
        scipy.io.savemat(tmp_path / "truth" / name / "1.mat", {"groundTruth": people})
    row = measured(dataset, tmp_path / "truth", tmp_path)
    assert row["segments"] == 4
    assert "2 images were measured" in row["said"]


def test_another_dataset_of_copied_images_is_matched_by_paths(tmp_path: Path) -> None:
    dataset = imported(written(tmp_path / "images", ["a/1", "b/1"]), tmp_path / "out")
    shutil.copytree(tmp_path / "images", tmp_path / "copy")
    truth = imported(tmp_path / "copy", tmp_path / "truth")
    assert_all_found(measured(dataset, truth, tmp_path), 2, 4)


def test_what_paths_do_not_tell_apart_is_refused(tmp_path: Path) -> None:
    dataset = imported(written(tmp_path / "images", ["a/1", "b/1"]), tmp_path / "out")
    one = write_sa1b(tmp_path / "one", {"1": []}, SIZE)
    two_more = written(tmp_path / "others", ["c/1", "d/1"])
    for truth, words in (
        (one, "Two images of the dataset are named alike, a/1.jpg and b/1.jpg, and one in"),
        (two_more, "names two images alike, as far as paths tell: c/1.json and d/1.json"),
    ):
        ended = call("jobs.evaluate_masks", "--input", dataset, "--truth", truth)
        assert ended.returncode == 3
        assert words in ended.stderr


def pairs(images: list[str], truths: list[str]) -> dict[str, str]:
    """What belongs together, of images below s3://b/photos."""
    here = (Named(f"s3://b/photos/{name}", name) for name in images)
    found = matched(here, [Named(name, name) for name in truths], "truth")
    return {image.removeprefix("s3://b/photos/"): truth for image, truth in found.items()}


@pytest.mark.parametrize(
    ("images", "truths", "expected"),
    [
        (["x/1.jpg"], ["y/1.png"], {"x/1.jpg": "y/1.png"}),
        (["a/1.jpg", "b/1.jpg"], ["v/b/1.jpg", "v/a/1.jpg"], {"a/1.jpg": "v/a/1.jpg", "b/1.jpg": "v/b/1.jpg"}),
        (["1.jpg", "1.png"], ["1.png", "1.jpg"], {"1.jpg": "1.jpg", "1.png": "1.png"}),
        (["a/1.jpg", "b/1.jpg"], ["a/1.jpg"], {"a/1.jpg": "a/1.jpg"}),
        (["a/1.jpg"], ["a/1.jpg", "b/1.jpg"], {"a/1.jpg": "a/1.jpg"}),
        # b's and c's are not the same picture, as folders do tell pictures apart here.
        (["a/1.jpg", "b/1.jpg"], ["a/1.jpg", "c/1.jpg"], {"a/1.jpg": "a/1.jpg"}),
        (["c/1.jpg", "c/a/1.jpg"], ["1.jpg", "a/1.jpg"], {"c/1.jpg": "1.jpg", "c/a/1.jpg": "a/1.jpg"}),
        (["x/1.jpg"], ["a/2.jpg", "b/2.jpg"], {}),
    ],
)
def test_the_longest_end_in_common_counts(images: list[str], truths: list[str], expected: dict[str, str]) -> None:
    assert pairs(images, truths) == expected
    assert pairs(images[::-1], truths[::-1]) == expected


@pytest.mark.parametrize(
    ("images", "truths"),
    [
        (["p/a/1.jpg", "q/a/1.jpg"], ["a/1.jpg"]),
        (["a/1.jpg"], ["p/a/1.jpg", "q/a/1.jpg"]),
        (["a/1.jpg", "c/1.jpg"], ["a/1.jpg", "a/1.jpg"]),
        (["a/1.jpg", "b/1.jpg"], ["1.jpg"]),
    ],
)
def test_ties_are_refused(images: list[str], truths: list[str]) -> None:
    with pytest.raises(TrainingDataError, match="alike"):
        pairs(images, truths)
