"""SA-1B becomes a masks dataset that every other command takes."""

import json
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from known_masks import blobs
from running import call, rows
from sa1b_folder import annotation, imported, tarred, write_sa1b

from pipeline.config import ImportConfig
from pipeline.importing import import_shard
from pipeline.reading import MaskSamples
from schemas.masks import Status

SIZE = (40, 60)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five images; the last has no masks."""
    images: dict[str, Any] = {
        f"sa_{i}": [annotation(mask, 0.8 + i / 100) for mask in blobs(3, *SIZE, seed=i)] for i in range(4)
    }
    return write_sa1b(tmp_path / "sa1b", images | {"sa_4": []}, SIZE)


def verified(output: Path) -> bool:
    found = call("jobs.verify_masks", "--output", output, "--processes", "1")
    return found.returncode == 0


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_dataset_of_sa1b_is_whole_and_sound(folder: Path, tmp_path: Path, kind: str) -> None:
    source = tarred(folder) if kind == "tar" else folder
    output = imported(source, tmp_path / "out", "--images-per-shard", "2")
    assert verified(output)
    summary = json.loads((output / "summary.json").read_text())
    assert summary["state"] == "complete"
    assert (summary["images"], summary["ok"], summary["empty"], summary["masks"]) == (5, 4, 1, 12)
    assert summary["skipped"] == {".json": 5}
    for number, row in enumerate(rows(output)):
        expected = json.loads((folder / f"sa_{number}.json").read_text())["annotations"]
        assert (row["height"], row["width"]) == SIZE
        for mask, given in zip(row["masks"], expected, strict=True):
            assert mask["segmentation"] == given["segmentation"]
            assert (mask["area"], mask["bbox"]) == (given["area"], given["bbox"])
            assert (mask["crop_box"], mask["point_coords"]) == ([0, 0, 60, 40], [[1.5, 2.5]])
            assert mask["predicted_iou"] == pytest.approx(0.8 + number / 100)
            assert mask["stability_score"] == pytest.approx(0.97)
    samples = list(MaskSamples(str(output)))
    assert len(samples) == 4
    assert all(sample.image_3HW is not None for sample in samples)


def test_what_is_wrong_with_a_json_is_its_row(folder: Path, tmp_path: Path) -> None:
    whole = json.loads((folder / "sa_0.json").read_text())

    def change(name: str, field: str, value: Any) -> None:
        mask = whole["annotations"][0] | {field: value}
        (folder / f"{name}.json").write_text(json.dumps(whole | {"annotations": [mask]}))

    other = annotation(np.ones((60, 40), bool))["segmentation"]
    write_sa1b(folder, {f"sa_{i}": [] for i in range(5, 11)}, SIZE)
    (folder / "sa_1.json").unlink()
    (folder / "sa_2.json").write_text("{")
    (folder / "sa_3.json").write_text("[1]")
    change("sa_5", "segmentation", other)
    change("sa_6", "segmentation", {"size": list(SIZE), "counts": "0"})
    change("sa_7", "predicted_iou", None)
    (folder / "sa_8.json").write_bytes(b"\xff\xfe")
    change("sa_9", "crop_box", [0, 0, 1e300, 1])
    image = whole["image"] | {"height": 2**30, "width": 2**30}
    (folder / "sa_10.json").write_text(json.dumps({"image": image, "annotations": []}))
    output = imported(folder, tmp_path / "out")
    assert verified(output)
    errors = {Path(row["uri"]).stem: (row["status"], row["error"] or "") for row in rows(output)}
    assert [errors[name][0] for name in ("sa_0", "sa_4")] == [Status.OK, Status.EMPTY]
    assert errors["sa_1"][0] == Status.FETCH_FAILED
    for name, words in {
        "sa_1": "sa_1.json",
        "sa_2": "damaged: Invalid JSON",
        "sa_3": "damaged: Input should be an object",
        "sa_5": "annotation 0 has an RLE of [60, 40], its image has [40, 60]",
        "sa_6": "annotation 0 has an RLE whose runs do not fill its image",
        "sa_7": "at annotations.0.predicted_iou",
        "sa_8": "damaged: Invalid JSON",
        "sa_9": "at annotations.0.crop_box.2",
        "sa_10": "an image of 1073741824 x 1073741824 pixels",
    }.items():
        assert words in errors[name][1]
        assert name == "sa_1" or errors[name][0] == Status.TRUNCATED
    (folder / "sa_1.json").write_text(json.dumps(whole))
    imported(folder, output, "--retry-failed")
    assert {Path(row["uri"]).stem: row["status"] for row in rows(output)}["sa_1"] == Status.OK


def test_a_json_that_a_tar_lacks_is_a_row(folder: Path, tmp_path: Path) -> None:
    (folder / "sa_2.json").unlink()
    output = imported(tarred(folder), tmp_path / "out")
    assert verified(output)
    assert [row["status"] for row in rows(output)] == ["ok", "ok", "fetch_failed", "ok", "empty"]
    assert "no JSON beside it in its tar" in rows(output)[2]["error"]


def test_boxes_and_areas_are_those_of_the_masks(folder: Path, tmp_path: Path) -> None:
    path = folder / "sa_0.json"
    document = json.loads(path.read_text())
    document["annotations"] = [mask | {"bbox": [0, 0, 1, 1], "area": 7} for mask in document["annotations"]]
    document["annotations"].append(annotation(np.zeros(SIZE, bool)))
    path.write_text(json.dumps(document))
    assert verified(imported(folder, tmp_path / "out"))


def test_another_process_can_be_told_to_make_a_shard(folder: Path, tmp_path: Path) -> None:
    config = ImportConfig(images=str(folder), output=str(imported(folder, tmp_path / "out")))
    expected = rows(config.output)
    shard = tmp_path / "out" / "masks" / "part-00000.parquet"
    shard.unlink()
    make = pickle.loads(pickle.dumps(partial(import_shard, config=config, provenance={"fingerprint": "x"})))
    assert make(0).images == 5
    assert rows(config.output) == expected


def test_no_cluster_is_asked(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # nothing listens there
    assert verified(imported(folder, tmp_path / "out"))


def test_an_import_is_refused_before_it_begins(folder: Path, tmp_path: Path) -> None:
    output = imported(folder, tmp_path / "out")
    for flags, code, words in (
        (("--images", folder, "--output", folder / "inside"), 2, "lies inside the input"),
        (("--images", tmp_path / "nowhere", "--output", tmp_path / "new"), 3, "nothing is there"),
        (
            ("--images", folder, "--output", output, "--images-per-shard", "3"),
            2,
            "images_per_shard (256 there, 3 here)",
        ),
    ):
        finished = call("jobs.import_sa1b", *flags)
        assert finished.returncode == code, finished.stderr
        assert words in finished.stderr
