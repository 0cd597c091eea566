"""The report as one HTML file that needs nothing else: no network, no other file.

Names and errors come from strangers' files. They are escaped in the markup, and the data of the script are JSON
without `<`; the page's own policy lets no other script run and nothing be fetched.
"""

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Final

import pipeline
from pipeline import storage
from pipeline.report.charts import counts, distribution, funnel
from pipeline.report.pictures import MOST_OUTLINES, Shown
from pipeline.report.tally import Ranked, Sampling, Tally

_HERE: Final = Path(__file__).parent
_ERROR_CHARACTERS: Final = 300
_GROUPS: Final = {
    "sample": "Sample",
    "most": "Most masks",
    "empty": "No masks",
    "unstable": "Least stable",
}


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the page says."""

    output: str
    """Address of the dataset."""
    document: dict[str, Any]
    """Its `run.json`."""
    summary: dict[str, Any] | None
    """Its `summary.json`, where there is one."""
    tally: Tally
    """Of its shards."""
    sampling: Sampling
    """How the tally chose images to show."""
    shown: Sequence[Shown]
    """Those images."""


def html_of(report: Report) -> str:
    """The whole page."""
    document, tally = report.document, report.tally
    title = f"Masks of {storage.redact(document['determinants']['images'])}"
    style, script = ((_HERE / name).read_text() for name in ("page.css", "page.js"))
    data = json.dumps(_data(tally, report.shown), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    body = [
        f"<header><h1>{escape(title)}</h1><p>{_lead(report)}</p></header>",
        _section("Funnel", _funnel(document, tally)),
        _section("Distributions", _distributions(document, tally)),
        _section("Images", _outcomes(document, tally)),
        _section("Pictures", _gallery(report.shown, report.sampling)),
        _section("Settings", _settings(document)),
    ]
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        '<meta name=color-scheme content="light dark">'
        f"<title>{escape(title)}</title><style>{style}</style></head>\n<body><main>"
        + "\n".join(body)
        + f"</main>\n<script type=application/json id=data>{data}</script>\n<script>{script}</script>"
        "</body></html>\n"
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _section(title: str, content: str) -> str:
    name = title.lower()
    return f"<section aria-labelledby={name}-title><h2 id={name}-title>{title}</h2>{content}</section>"


def _lead(report: Report) -> str:
    document, summary, tally = report.document, report.summary, report.tally
    processed = tally.statuses["ok"] + tally.statuses["empty"]
    each = f", {tally.masks / processed:.1f} an image" if processed else ""
    state = f"The run is {summary['state'].replace('_', ' ')}. " if summary else "The run has not ended. "
    return escape(
        f"{tally.masks:,} masks in {processed:,} of {document['manifest']['images']:,} images{each}; "
        f"{_bytes(tally.bytes)} in {storage.redact(report.output)}, {tally.seconds / 3600:,.2f} worker-hours. "
        f"{state}"
        f"Begun {document['created']}, everymask {document['everymask']}; report by {pipeline.__version__}."
    )


def _funnel(document: dict[str, Any], tally: Tally) -> str:
    dropped = tally.funnel
    if "curation" in document["determinants"]:
        return "<p>These masks are curated: a report of the dataset that they come from has the funnel.</p>"
    if "amg" not in document["determinants"]:
        return "<p>These masks were imported, not made here: there were no candidates.</p>"
    if not dropped:
        return "<p>The shards do not say: they were made before this was counted, or hold no processed image.</p>"
    confident = dropped["confident"]
    stable = confident - dropped["unstable"]
    whole = stable - dropped["cut"]
    steps = [
        ("Candidates", dropped["candidates"], "Predicted by the model, three a prompt"),
        ("Confident", confident, "With a predicted IoU above the threshold"),
        ("Stable", stable, "Not measured as less stable than the threshold"),
    ]
    if dropped["cut"]:
        steps.append(("Whole", whole, "Not cut by the edge of a crop"))
    steps.append(("No duplicates", whole - dropped["duplicates"], "In the dataset"))
    note = (
        "<p class=note>What surely overlaps a better mask is dropped without being measured, and counts as a "
        "duplicate. So “stable” still holds duplicates whose stability nobody knows.</p>"
    )
    if tally.uncounted:
        note += f"<p class=note>Without {tally.uncounted:,} shards that were made before this was counted.</p>"
    return funnel(steps) + note


def _distributions(document: dict[str, Any], tally: Tally) -> str:
    def score(value: float) -> str:
        return f"{value:.3f}".rstrip("0").rstrip(".")

    def share(value: float) -> str:
        return f"{float(f'{100 * 10**value:.2g}'):g}%"

    def percent(value: float) -> str:
        return f"{value:.1%}".replace(".0%", "%")

    charts = [
        distribution(
            "Masks an image.", tally.histograms["masks"], lambda value: f"{value:,.1f}".removesuffix(".0"), ""
        ),
        distribution(
            "Area.",
            tally.histograms["area"],
            share,
            "Share of the picture in a mask; axis and mean are logarithmic.",
        ),
        distribution(
            "Predicted IoU.",
            tally.histograms["predicted_iou"],
            score,
            "The model's own estimate; dashed where a threshold is.",
            _threshold(document, "pred_iou_thresh"),
        ),
        distribution(
            "Stability score.",
            tally.histograms["stability_score"],
            score,
            "Dashed where a threshold is.",
            _threshold(document, "stability_score_thresh"),
        ),
        distribution(
            "Coverage.", tally.histograms["coverage"], percent, "Share of a picture in any of its masks."
        ),
    ]
    return f"<div class=charts>{''.join(charts)}</div>"


def _threshold(document: dict[str, Any], name: str) -> list[float]:
    """To be marked, if it is one: the run's or its curation's, the higher one; at 0 or less all masks stay."""
    steps = [document["determinants"].get(step, {}).get(name) for step in ("amg", "curation")]
    threshold = max(step or 0.0 for step in steps)
    return [threshold] if threshold > 0 else []


def _outcomes(document: dict[str, Any], tally: Tally) -> str:
    not_done = document["manifest"]["images"] - tally.images
    named = [(status, count) for status, count in tally.statuses.most_common()]
    parts = [counts([*named, *([("not done", not_done)] if not_done else [])], ("What became of it", "Images"))]
    if tally.failures:
        rows = "".join(
            f"<tr><th scope=row>{escape(status)}</th><td>{escape(failure.uri)}</td>"
            f"<td>{escape(failure.error[:_ERROR_CHARACTERS])}</td></tr>"
            for status, failures in tally.failures.items()
            for failure in failures
        )
        parts.append(
            "<h3>Failures</h3><p class=note>The first of each reason.</p><div class=scroll><table class=long><tr>"
            f"<th>Status</th><th>Image</th><th>Error</th></tr>{rows}</table></div>"
        )
    if tally.unread:
        parts.append(
            f"<h3>Shards left out</h3><p>{tally.unread:,} cannot be read; their images count as not done. "
            "<code>python -m jobs.verify_masks</code> says more.</p>" + _list(tally.faults)
        )
    return "".join(parts)


def _gallery(shown: Sequence[Shown], sampling: Sampling) -> str:
    missing = [f"{image.uri}: {image.missing}" for image in shown if image.missing]
    gone = ""
    if missing:
        gone = (
            f"<h3>Pictures that cannot be shown</h3><p>{len(missing)} of the {len(shown)} images are gone or "
            f"changed since their masks were made; their masks are drawn without them.</p>{_list(missing)}"
        )
    buttons = "".join(
        f"<label><input type=radio name=group value={key}{' checked' if key == 'sample' else ''}><span>{name} "
        f"<small id=count-{key}></small></span></label>"
        for key, name in _GROUPS.items()
    )
    return (
        f"<p class=note>A random sample of up to {sampling.sampled} processed images (seed {sampling.seed}), and "
        f"up to {sampling.outliers} of each kind of outlier. Of an image the {MOST_OUTLINES} largest masks are "
        "drawn. Choose a picture to see its masks with their scores. The keys ← and → turn pages; in a picture "
        "they go to the next, and Esc closes it.</p>"
        "<noscript><p>The page's own script draws the pictures, and your browser does not run it.</p></noscript>"
        f"<div class=controls><fieldset class=groups><legend>Which</legend>{buttons}</fieldset>"
        "<label class=slider>Predicted IoU at least <output id=iou-value for=iou></output>"
        "<input id=iou type=range></label>"
        "<label class=slider>Stability at least <output id=stability-value for=stability></output>"
        "<input id=stability type=range></label></div>"
        "<p id=drawn role=status></p><ul id=gallery></ul>"
        '<nav class=pager aria-label="Pages of pictures"><button id=previous type=button>← Back</button>'
        "<span id=page></span><button id=next type=button>On →</button></nav>"
        f"{gone}"
        "<dialog id=viewer aria-labelledby=viewer-title><div class=viewer-head><h3 id=viewer-title></h3>"
        "<button id=close type=button>Close</button></div><div class=viewer-body><div id=viewer-picture></div>"
        "<div><p id=viewer-says></p><ol id=viewer-masks></ol></div></div></dialog>"
    )


def _settings(document: dict[str, Any]) -> str:
    model = document["settings"].get("model", {})  # curation has none
    named = {
        **document["determinants"],
        "model": {name: model.get(name) for name in ("model", "checkpoint", "device")},
        "fingerprint": document["fingerprint"],
    }
    rows = "".join(
        f"<tr><th scope=row>{escape(name)}</th><td>{escape(storage.redact(str(value)))}</td></tr>"
        for name, value in _flat(named)
    )
    return f"<div class=scroll><table class=long>{rows}</table></div>"


def _flat(named: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in named.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif value is not None:
            yield prefix + name, value


def _list(lines: Sequence[str]) -> str:
    return f"<ul class=lines>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"


def _bytes(count: int) -> str:
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.2f} MiB"


def _data(tally: Tally, shown: Sequence[Shown]) -> dict[str, Any]:
    """What the page's script draws."""
    places = {image.image_id: place for place, image in enumerate(shown)}

    def group(ranked: Sequence[Ranked]) -> list[int]:
        return [places[image.image_id] for image in ranked if image.image_id in places]

    return {
        "groups": {key: group(getattr(tally, key)) for key in _GROUPS},
        "images": [
            {
                "id": image.image_id,
                "uri": image.uri,
                "size": image.size,
                "shown": image.shown_size,
                "jpeg": base64.b64encode(image.jpeg).decode(),
                "missing": image.missing,
                "total": image.masks,
                "masks": image.outlines,
            }
            for image in shown
        ],
    }
