"""Draw how cost grows: `python benchmarks/plots.py docs/pictures/growth.svg`.

Numbers are those of the tables of `docs/performance.md` and `docs/scale.md`.
"""

import argparse
from pathlib import Path
from typing import Any, Final, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

DOCS: Final = Path(__file__).parents[1] / "docs"
# Paths of letters instead of a font's name, and the same ids each time: the same tables give the same bytes.
STYLE: Final[dict[Any, Any]] = {"svg.fonttype": "path", "svg.hashsalt": "growth", "font.size": 9}


class Panel(NamedTuple):
    """One plot, `x` and `y` on logarithmic axes: columns of the only table that begins with `x` and has them."""

    page: str
    x: str
    y: str
    title: str
    right: str | None = None
    """Another column, dashed, on a linear axis of its own."""
    among: str | None = None
    """A column that tells the table from others."""


PANELS: Final = (
    Panel("performance.md", "points per side", "s", "Points a side, one photograph", "peak MiB"),
    Panel("performance.md", "megapixels", "s", "Megapixels, 16 points a side", "peak MiB"),
    Panel("performance.md", "images", "s", "Images of a run, one worker, 256 a shard"),
    Panel("scale.md", "images", "s", "Images listed, sorted and numbered", "peak MiB", "prefixes"),
)


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", help="file that receives the picture, as SVG")
    draw(Path(parser.parse_args().output))


def draw(output: Path) -> None:
    """All panels, in one picture."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 6), layout="constrained")
        for panel, axes in zip(PANELS, figure.subplots(2, 2).flat, strict=True):
            _draw(panel, axes)
        figure.savefig(output, format="svg", metadata={"Date": None})


def _draw(panel: Panel, axes: Axes) -> None:
    wanted = [panel.y, *([panel.right] if panel.right else [])]
    table = table_with(DOCS / panel.page, panel.x, [*wanted, *([panel.among] if panel.among else [])])
    # Of the runs, those that differ in nothing but their images.
    rows = [row for row in table if row.get("workers", "1") == "1" and row.get("images a shard", "256") == "256"]
    places = [number(row[panel.x]) for row in rows]
    for column, style, color in zip(wanted, ("-", "--"), ("C0", "C1"), strict=False):
        where = axes if column == panel.y else axes.twinx()
        where.plot(places, [number(row[column]) for row in rows], style, marker="o", color=color)
        if where is axes:
            where.set_yscale("log")
        else:
            where.set_ylim(bottom=0)
        where.set_ylabel(column, color=color)
    axes.set_xscale("log")
    axes.set_xticks(places, [row[panel.x] for row in rows])
    axes.minorticks_off()
    axes.set_title(panel.title)


def table_with(page: Path, first: str, columns: list[str]) -> list[dict[str, str]]:
    """Rows of the only table of a Markdown page whose first column is `first` and that has these columns.

    Raises:
        ValueError: there is not exactly one.
    """
    blocks: list[list[list[str]]] = [[]]
    for line in page.read_text().splitlines():
        if line.startswith("|"):
            blocks[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        elif blocks[-1]:
            blocks.append([])
    found = [block for block in blocks if block and block[0][0] == first and {*columns} <= {*block[0]}]
    if len(found) != 1:
        raise ValueError(f"{page.name} has {len(found)} tables of {first} with {', '.join(columns)}")
    head, _, *rows = found[0]
    return [dict(zip(head, row, strict=True)) for row in rows]


def number(cell: str) -> float:
    """`1,000` is a thousand."""
    return float(cell.replace(",", ""))


if __name__ == "__main__":
    main()
