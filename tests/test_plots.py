"""The picture of growth shows what the documents' tables say."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import plots  # noqa: E402


def test_the_picture_is_that_of_the_tables(tmp_path: Path) -> None:
    plots.draw(tmp_path / "growth.svg")
    kept = ROOT / "docs" / "pictures" / "growth.svg"
    assert (tmp_path / "growth.svg").read_bytes() == kept.read_bytes(), "python benchmarks/plots.py makes it anew"


def test_one_table_is_meant(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "| images | s |\n|---|---|\n| 1,000 | 2.5 |\n\nand\n\n| images | masks |\n|---|---|\n| 1 | 2 |\n"
    )
    [row] = plots.table_with(page, "images", ["s"])
    assert plots.number(row["images"]) == 1000
    assert plots.number(row["s"]) == 2.5
    for columns in ([], ["nothing"]):
        with pytest.raises(ValueError, match=r"page\.md has [02] tables of images"):
            plots.table_with(page, "images", columns)
