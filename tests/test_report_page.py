"""jobs.report: the page is whole, says what the dataset holds, and needs nothing else.

A browser looks at it in test_report_browser.py.
"""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from curated_masks import SIZE, curated, make, masks_run, record
from drawn_dataset import drawn_dataset
from known_masks import box
from PIL import Image
from running import call, rows, write_jpegs
from sa1b_folder import annotation, imported, write_sa1b

from pipeline.curation.config import StepsConfig
from pipeline.report import pictures

REFERENCES = {"src", "href", "action", "data", "srcset", "poster"}
VOID = {"meta", "input"}


class Page(HTMLParser):
    """Tags with their attributes, texts by tag, and whether every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def attributes(self, name: str) -> list[str]:
        return [value for _, attributes in self.tags if (value := attributes.get(name))]

    @property
    def text(self) -> str:
        """What a reader sees."""
        return " ".join(part for tag, part in self.texts if tag not in {"script", "style"})


def data_of(text: str) -> dict[str, Any]:
    found = re.search(r"<script type=application/json id=data>(.*?)</script>", text, re.DOTALL)
    assert found
    document: dict[str, Any] = json.loads(found[1])
    return document


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 images in 3 shards, one of which is no image; names that would be markup."""
    folder = tmp_path_factory.mktemp("report")
    images = write_jpegs(folder / "in", 18)
    (images / "<script>alert(1)<!--.jpg").write_bytes(b"no image")
    (images / "named <").mkdir()
    (images / "named </script>&quot.jpg").write_bytes((images / "0003.jpg").read_bytes())
    drawn_dataset(images, folder / "out")
    return folder / "out"


@pytest.fixture(scope="module")
def page(dataset: Path) -> str:
    result = call("jobs.report", "--input", dataset, "--output", dataset.parent / "report")
    assert result.returncode == 0, result.stderr
    [only] = (dataset.parent / "report").iterdir()
    assert only.name == "index.html"
    return only.read_text()


def test_the_page_is_well_formed_and_every_reference_is_in_it(page: str) -> None:
    parsed = Page(page)
    assert parsed.open == []
    ids = parsed.attributes("id")
    assert len(ids) == len(set(ids))
    named = {
        word for name in ("aria-labelledby", "for") for value in parsed.attributes(name) for word in value.split()
    }
    script = next(text for tag, text in parsed.texts if tag == "script" and "use strict" in text)
    named |= set(re.findall(r'(?:\$|getElementById)\("([\w-]+)"\)', script))
    named |= {f"count-{group}" for group in data_of(page)["groups"]} | {"iou-value", "stability-value"}
    assert named <= set(ids)
    classes = {word for value in parsed.attributes("class") for word in value.split()}
    assert {f".{name}" for name in classes - {"says", "picture"}} <= set(re.findall(r"\.[\w-]+", page))


def test_the_page_asks_for_nothing_else(page: str) -> None:
    parsed = Page(page)
    assert not [value for name in REFERENCES for value in parsed.attributes(name)]
    [policy] = [value for value in parsed.attributes("content") if "default-src" in value]
    assert policy.startswith("default-src 'none'; img-src data:; ")
    assert "unsafe" not in policy
    # The name of SVG, which nothing fetches.
    assert set(re.findall(r"(?:https?|wss?)://[\w.]+", page)) == {"http://www.w3.org"}
    assert "url(" not in page
    assert "@import" not in page


def test_strangers_names_are_text(page: str) -> None:
    parsed = Page(page)
    assert page.count("<script") == 2
    assert "<script>alert(1)<!--.jpg" in parsed.text
    assert any("</script>&quot" in image["uri"] for image in data_of(page)["images"])


def test_the_page_says_what_the_dataset_holds(page: str, dataset: Path) -> None:
    found = rows(dataset)
    masks = sum(len(row["masks"]) for row in found)
    summary = json.loads((dataset / "summary.json").read_text())
    text = re.sub(r"\s+", " ", Page(page).text)
    assert f"{masks:,} masks in 19 of 20 images" in text
    assert "The run is complete." in text
    for count in (summary["funnel"]["candidates"], summary["funnel"]["confident"], masks):
        assert f"{count:,}" in text
    assert "not_an_image" in text
    assert "amg.pred_iou_thresh 0.85" in text


def test_the_pictures_are_the_images_with_their_masks(page: str, dataset: Path) -> None:
    found = {row["image_id"]: row for row in rows(dataset)}
    data = data_of(page)
    assert {image["id"] for image in data["images"]} == {i for i, row in found.items() if row["status"] == "ok"}
    for image in data["images"]:
        row = found[image["id"]]
        assert (image["uri"], image["size"], image["missing"]) == (row["uri"], [row["width"], row["height"]], None)
        with Image.open(io.BytesIO(base64.b64decode(image["jpeg"]))) as jpeg:
            assert list(jpeg.size) == image["shown"] == [128, 96]
            original = np.array(Image.open(row["uri"].removeprefix("file://")), float)
            assert abs(np.array(jpeg, float) - original).mean() < 5
        assert image["total"] == len(image["masks"]) == len(row["masks"])
        assert [mask[1] for mask in image["masks"]] == sorted((m["area"] for m in row["masks"]), reverse=True)
    assert len(data["groups"]["sample"]) == 19
    assert len(data["groups"]["most"]) == 8


def test_a_page_is_the_same_again_and_bounded(page: str, dataset: Path, tmp_path: Path) -> None:
    flags = ("--input", dataset, "--sample", "3", "--outliers", "1")
    for name, seed in (("a", 4), ("b", 4), ("c", 5)):
        assert call("jobs.report", *flags, "--output", tmp_path / name, "--seed", str(seed)).returncode == 0
    a, b, c = ((tmp_path / name / "index.html").read_text() for name in "abc")
    assert a == b
    assert len(data_of(a)["images"]) <= 5
    assert data_of(a)["groups"]["sample"] != data_of(c)["groups"]["sample"] or a != c
    assert len(a) < len(page) < 19 * 400_000 + 100_000


def test_images_that_are_gone_or_changed_are_named(tmp_path: Path) -> None:
    images = write_jpegs(tmp_path / "in", 4)
    drawn_dataset(images, tmp_path / "out")
    (images / "0001.jpg").unlink()
    (images / "0002.jpg").write_bytes(b"another")
    result = call("jobs.report", "--input", tmp_path / "out", "--output", tmp_path / "report")
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "report/index.html").read_text()
    text = Page(page).text
    assert "2 of the 4 images are gone or changed" in text
    for name, why in (("0001.jpg", "fetch_failed"), ("0002.jpg", "changed")):
        assert re.search(rf"{name}: {why}: ", text), name
        assert name in result.stderr
    by_name = {image["uri"][-8:]: image for image in data_of(page)["images"]}
    assert not by_name["0001.jpg"]["jpeg"]
    assert by_name["0001.jpg"]["masks"]
    assert by_name["0003.jpg"]["jpeg"]


def test_missing_and_damaged_shards_are_told_and_left_out(tmp_path: Path) -> None:
    drawn_dataset(write_jpegs(tmp_path / "in", 6), tmp_path / "out", images_per_shard=2)
    (tmp_path / "out/masks/part-00000.parquet").unlink()
    (tmp_path / "out/masks/part-00001.parquet").write_bytes(b"PAR1")
    (tmp_path / "out/summary.json").unlink()
    result = call("jobs.report", "--input", tmp_path / "out", "--output", "memory://there/report")
    assert result.returncode == 0, result.stderr
    page = fsspec.filesystem("memory").cat_file("/there/report/index.html").decode()
    text = re.sub(r"\s+", " ", Page(page).text)
    assert "in 2 of 6 images" in text
    assert "not done 4" in text
    assert "masks/part-00001.parquet" in text
    assert len(data_of(page)["images"]) == 2


def report_of(dataset: Path) -> str:
    result = call("jobs.report", "--input", dataset, "--output", dataset.parent / "report")
    assert result.returncode == 0, result.stderr
    return (dataset.parent / "report" / "index.html").read_text()


def test_a_curated_dataset_has_a_report(tmp_path: Path) -> None:
    masks = [record(box(SIZE, 8, 8, 40, 40), iou, stability_score=iou) for iou in (0.7, 0.891, 0.951, 0.99)]
    source = masks_run(tmp_path, [masks, []])
    curation = curated(source, StepsConfig(pred_iou_thresh=0.89))
    text = report_of(make(curation))
    assert "3 masks in 2 of 2 images" in Page(text).text
    assert "These masks are curated" in Page(text).text
    assert "curation.pred_iou_thresh 0.89" in Page(text).text
    assert re.findall(r"class=mark[^>]*><title>([^<]*)", text) == ["0.89", "0.95"]  # the curation's, the run's


def test_an_imported_dataset_has_a_report(tmp_path: Path) -> None:
    folder = write_sa1b(tmp_path / "sa1b", {"sa_1": [annotation(box(SIZE, 8, 8, 40, 40))]}, SIZE)
    text = Page(report_of(imported(folder, tmp_path / "out"))).text
    assert "1 masks in 1 of 1 images" in text
    assert "These masks were imported" in text
    assert "source SA-1B" in text


def test_what_this_version_does_not_read_is_refused(tmp_path: Path) -> None:
    drawn_dataset(write_jpegs(tmp_path / "in", 1), tmp_path / "out")
    run = json.loads((tmp_path / "out/run.json").read_text())
    flags = ("--input", tmp_path / "out", "--output", tmp_path / "report")

    run["determinants"]["schema"] = {"manifest": 1, "embeddings": 1}
    (tmp_path / "out/run.json").write_text(json.dumps(run))
    result = call("jobs.report", *flags)
    assert result.returncode == 2
    assert "holds no masks but embeddings" in result.stderr
    assert call("jobs.report", "--input", tmp_path / "in", "--output", tmp_path / "report").returncode == 2
    assert not (tmp_path / "report").exists()


def test_a_small_picture_is_small_and_of_so_many_bytes_at_most() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (700, 1400, 3), np.uint8)
    data = pictures._small_jpeg(noise, (640, 320))
    assert len(data) <= 100_000
    assert Image.open(io.BytesIO(data)).size == (640, 320)
