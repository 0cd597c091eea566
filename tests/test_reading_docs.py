"""`docs/reading.md`: its examples run, and its flags are the commands'."""

import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from known_masks import blobs
from running import rows
from sa1b_folder import annotation, imported, write_sa1b
from test_readme import fields, flags_in

from jobs.evaluate_masks import evaluate_masks
from pipeline.config import ImportConfig

DOCS = (Path(__file__).parent.parent / "docs" / "reading.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```", DOCS, re.DOTALL | re.MULTILINE)
IMAGES = 5


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five images with three masks each in `out`, in the current folder."""
    images = {f"sa_{i}": [annotation(mask) for mask in blobs(3, 40, 60, seed=i)] for i in range(IMAGES)}
    monkeypatch.chdir(tmp_path)
    return imported(write_sa1b(tmp_path / "images", images, (40, 60)), tmp_path / "out", "--images-per-shard", "2")


def run(word: str) -> dict[str, Any]:
    """The names that the one example with this word leaves."""
    [code] = [example for example in EXAMPLES if word in example]
    names: dict[str, Any] = {}
    exec(code, names)
    return names


def test_arrow(dataset: Path) -> None:
    table = run("pyarrow.compute")["table"]
    assert (table.num_rows, table.column_names) == (IMAGES, ["uri", "height", "width"])


def test_duckdb(dataset: Path) -> None:
    largest = run("duckdb")["largest"]
    areas = sorted((mask["area"] for row in rows(dataset) for mask in row["masks"]), reverse=True)
    assert [area for _, area, _ in largest] == areas[:10]


def test_hugging_face(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(dataset.parent / "hf"))
    names = run("load_dataset")
    assert names["areas"] == [mask["area"] for row in rows(dataset) for mask in row["masks"]]
    assert list(names["rows"]) == pq.read_table(dataset / "masks").to_pylist()


def test_pytorch(dataset: Path) -> None:
    names = run("set_epoch(epoch)")
    assert names["image"].shape == (3, 40, 60)
    assert names["masks"].shape == (3, 40, 60)
    assert (names["boxes"].shape, names["scores"].shape) == ((3, 4), (3,))


def test_batches(dataset: Path) -> None:
    batches = run("collate_fn")["batches"]
    assert [[image.shape for image in batch] for batch in batches] == [[(3, 40, 60)] * 4, [(3, 40, 60)]]


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # torchdata with this PyTorch
@pytest.mark.parametrize("word", ["StatefulDataLoader", "passed"])
def test_going_on(dataset: Path, word: str) -> None:
    names = run(word)
    first = names.get("first") or names["sample"]
    assert sorted(sample.image_id for sample in (first, *names["rest"])) == list(range(IMAGES))


@pytest.mark.alone
@pytest.mark.filterwarnings("default")  # Ray's own
def test_ray(dataset: Path) -> None:
    assert run("to_ray")["count"] == IMAGES


def test_its_flags_are_the_commands() -> None:
    measuring = {f"--{name}" for name in evaluate_masks.__annotations__} - {"--return"}
    assert flags_in(DOCS) <= measuring | {flag for flag, _ in fields(ImportConfig)}


def test_files_that_it_links_to_are_there() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", DOCS)
    assert [link for link in links if not (Path(__file__).parent.parent / "docs" / link).exists()] == []
