"""Small charts as inline SVG, with the same numbers as text for those who do not see them."""

from collections.abc import Callable, Sequence
from html import escape
from typing import Final

from pipeline.report.histogram import Bar, Histogram

_WIDTH: Final = 400
_HEIGHT: Final = 120
_BASE: Final = 22  # below the bars, for the axis

Label = Callable[[float], str]


def distribution(title: str, histogram: Histogram, label: Label, note: str, marks: Sequence[float] = ()) -> str:
    """A chart of bars and a table of the same numbers.

    Args:
        title: Plain text, as `note` is.
        histogram: The values.
        label: How a value is written.
        note: One sentence, what the values are.
        marks: Values at which a dashed line stands: thresholds.
    """
    bars = histogram.bars()
    if not bars:
        return f"<figure><figcaption><b>{escape(title)}</b> There is nothing to show.</figcaption></figure>"
    says = f"{histogram.count:,} values, median {label(histogram.median)}, mean {label(histogram.mean)}"
    rows = "".join(
        f"<tr><td>{escape(label(bar.low))} to {escape(label(bar.high))}</td><td>{bar.count:,}</td></tr>"
        for bar in bars
    )
    return (
        f"<figure><figcaption><b>{escape(title)}</b> {escape(note)} {escape(says)}.</figcaption>"
        f"{_svg(f'{title}: {says}', bars, label, marks)}"
        f"<details><summary>Numbers</summary><div class=scroll><table><tr><th>From, to below</th><th>Count</th>"
        f"</tr>{rows}</table></div></details></figure>"
    )


def _svg(says: str, bars: Sequence[Bar], label: Label, marks: Sequence[float]) -> str:
    low, high, most = bars[0].low, bars[-1].high, max(bar.count for bar in bars)
    room = _HEIGHT - _BASE

    def across(value: float) -> float:
        return (value - low) / (high - low) * _WIDTH

    drawn = ""
    for bar in bars:
        left, right = across(bar.low), across(bar.high)
        height = bar.count / most * (room - 4)
        if bar.count:
            height = max(height, 1.0)  # one of a million is still to be seen
        x, y, width = left + 0.5, room - height, max(right - left - 1, 0.5)
        drawn += (
            f'<rect class=bar x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}">'
            f"<title>{escape(label(bar.low))} to {escape(label(bar.high))}: {bar.count:,}</title></rect>"
        )
    for mark in marks:
        if low <= mark <= high:
            drawn += (
                f'<path class=mark d="M{across(mark):.1f} 0V{room}"><title>{escape(label(mark))}</title></path>'
            )
    ticks = [(0, "start", low), (_WIDTH / 2, "middle", (low + high) / 2), (_WIDTH, "end", high)]
    axis = "".join(
        f'<text x="{x:.0f}" y="{_HEIGHT - 6}" text-anchor="{anchor}">{escape(label(value))}</text>'
        for x, anchor, value in ticks
    )
    return (
        f'<svg class=chart role=img viewBox="0 0 {_WIDTH} {_HEIGHT}" aria-label="{escape(says)}">{drawn}'
        f'<path class=axis d="M0 {room}H{_WIDTH}"/>{axis}</svg>'
    )


def funnel(steps: Sequence[tuple[str, int, str]]) -> str:
    """Bars below one another, each with its name, its count, its share of the first, and what it means."""
    first = max(1, steps[0][1])
    rows = "".join(
        f"<tr><th scope=row>{escape(name)}</th><td>{count:,}</td><td>{count / first:.1%}</td>"
        f'<td class=wide><svg viewBox="0 0 100 8" preserveAspectRatio=none aria-hidden=true>'
        f'<rect class=bar width="{100 * count / first:.2f}" height=8 /></svg>{escape(meaning)}</td></tr>'
        for name, count, meaning in steps
    )
    return f"<div class=scroll><table class=funnel>{rows}</table></div>"


def counts(named: Sequence[tuple[str, int]], header: tuple[str, str]) -> str:
    """A table of names and counts."""
    rows = "".join(f"<tr><th scope=row>{escape(name)}</th><td>{count:,}</td></tr>" for name, count in named)
    return (
        f"<div class=scroll><table><tr><th>{escape(header[0])}</th><th>{escape(header[1])}</th></tr>{rows}"
        "</table></div>"
    )
