"""The picture of growth shows what the documents' tables say."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NUMBER = r"(-?\d+\.\d+)"
HASH = r"\b[mp][0-9a-f]{10}\b"  # of an element, which the last bit of a number changes
sys.path.append(str(ROOT / "benchmarks"))

import plots  # noqa: E402


def test_the_picture_is_that_of_the_tables(tmp_path: Path) -> None:
    plots.draw(tmp_path / "growth.svg")
    drawn, kept = (
        re.split(NUMBER, re.sub(HASH, "", path.read_text()))
        for path in (tmp_path / "growth.svg", ROOT / "docs/pictures/growth.svg")
    )
    assert drawn[::2] == kept[::2], "python benchmarks/plots.py docs/pictures/growth.svg makes it anew"
    assert [*map(float, drawn[1::2])] == pytest.approx([*map(float, kept[1::2])], abs=0.01)


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
