"""Settings of mask generation side by side on a few images, to choose from by eye and by price."""

import io
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from pipeline import rle
from pipeline.amg import MaskGenerator
from pipeline.errors import SettingsError
from pipeline.model import SamModel
from pipeline.overlay import overlay
from schemas.masks import MASKS_SCHEMA

MOST_SETTINGS: Final = 100
_CELL: Final = (240, 180)  # width and height of a picture of the sheet
_CAPTION: Final = 26
_FONT_SIZE: Final = 15

Rgb = NDArray[np.uint8]


class Setting(NamedTuple):
    """One row of the table. None: the weights' own threshold."""

    points_per_side: int
    pred_iou_thresh: float | None
    stability_score_thresh: float | None


@dataclass(frozen=True, kw_only=True)
class Tried:
    """What a setting made of the images; numbers are means over them."""

    setting: Setting
    """With the thresholds that it came to."""
    masks: float
    coverage: float
    """Share of the picture in any mask, 0 to 1."""
    stability: float | None
    """Of all masks; None where there are none."""
    seconds: float
    bytes: float
    """Of the rows as they are stored, without what a file has once."""
    pictures: tuple[Image.Image, ...]
    """Each image with its masks, small."""


def grid_of(
    points_per_side: Sequence[int],
    pred_iou_thresh: Sequence[float] | None,
    stability_score_thresh: Sequence[float] | None,
) -> list[Setting]:
    """Every combination; no thresholds are the weights' own.

    Raises:
        SettingsError: there are more than `MOST_SETTINGS`, or none.
    """
    own: Sequence[None] = [None]
    combinations = itertools.product(points_per_side, pred_iou_thresh or own, stability_score_thresh or own)
    settings = [Setting(*values) for values in combinations]
    if not 0 < len(settings) <= MOST_SETTINGS:
        raise SettingsError(f"{len(settings)} settings to try; 1 to {MOST_SETTINGS} fit on a contact sheet.")
    return settings


def try_settings(model: SamModel, images: Sequence[Rgb], settings: Sequence[Setting]) -> Iterator[Tried]:
    """Make the masks of the images once with each setting.

    Args:
        model: Loaded and checked.
        images: uint8 RGB, one at least.
        settings: Otherwise the defaults of `pipeline.config.AmgConfig`.
    """
    for setting in settings:
        generator = MaskGenerator(model, **setting._asdict())
        made, seconds = list[list[dict[str, Any]]](), list[float]()
        for rgb_HW3 in images:
            start = time.perf_counter()
            made.append(generator.generate(rgb_HW3))
            seconds.append(time.perf_counter() - start)
        stabilities = np.array([mask["stability_score"] for masks in made for mask in masks])
        coverages = [
            rle.covered([mask["segmentation"] for mask in masks]) / rgb_HW3[..., 0].size
            for rgb_HW3, masks in zip(images, made, strict=True)
        ]
        config = generator.config
        yield Tried(
            setting=Setting(setting.points_per_side, config.pred_iou_thresh, config.stability_score_thresh),
            masks=float(np.mean([len(masks) for masks in made])),
            coverage=float(np.mean(coverages)),
            stability=float(np.nan_to_num(stabilities).mean()) if len(stabilities) else None,
            seconds=float(np.mean(seconds)),
            bytes=_stored_bytes(made) / len(images),
            pictures=tuple(_small(overlay(rgb_HW3, masks)) for rgb_HW3, masks in zip(images, made, strict=True)),
        )


def _stored_bytes(made: list[list[dict[str, Any]]]) -> int:
    """Of the column `masks`, compressed as shards are."""
    field = MASKS_SCHEMA.field("masks")
    table = pa.Table.from_pylist([{"masks": masks} for masks in made], pa.schema([field]))
    file = io.BytesIO()
    pq.write_table(table, file, compression="zstd")
    group = pq.read_metadata(file).row_group(0)
    return sum(group.column(column).total_compressed_size for column in range(group.num_columns))


def _small(rgb_HW3: Rgb) -> Image.Image:
    return ImageOps.pad(Image.fromarray(rgb_HW3), _CELL, Image.Resampling.BOX, color="white")


def contact_sheet(tried: Sequence[Tried]) -> Image.Image:
    """A row of pictures a setting, a column an image, with the setting above its row."""
    width, height = _CELL
    sheet = Image.new("RGB", (len(tried[0].pictures) * width, len(tried) * (height + _CAPTION)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT_SIZE)
    for row, one in enumerate(tried):
        top = row * (height + _CAPTION)
        points, iou, stability = one.setting
        caption = f"{row + 1}: {one.masks:.1f} masks, {points} points, IoU {iou:g}, stability {stability:g}"
        draw.text((4, top + 4), caption, "black", font)
        for column, picture in enumerate(one.pictures):
            sheet.paste(picture, (column * width, top + _CAPTION))
    return sheet


def as_markdown(tried: Sequence[Tried], images: Sequence[str]) -> str:
    """The table, with the images that it is of.

    Args:
        tried: What is compared.
        images: Addresses, without credentials.
    """
    columns = (
        *("#", "points per side", "pred IoU thresh", "stability thresh", "masks", "coverage", "mean stability"),
        *("seconds", "bytes"),
    )
    lines = [
        "# Settings side by side",
        "",
        f"Means over {len(images)} images, seconds on this machine. The numbers on the left are those of the rows "
        "of `contact-sheet.jpg`.",
        "",
        f"| {' | '.join(columns)} |",
        f"|{'---:|' * len(columns)}",
    ]
    for number, one in enumerate(tried, start=1):
        points, iou, least = one.setting
        stability = "-" if one.stability is None else f"{one.stability:.3f}"
        lines.append(
            f"| {number} | {points} | {iou:g} | {least:g} | {one.masks:.1f} | {one.coverage:.1%} | {stability} | "
            f"{one.seconds:.2f} | {one.bytes:,.0f} |"
        )
    return "\n".join(
        [*lines, "", "Columns of the sheet, from the left:", "", *(f"* `{uri}`" for uri in images), ""]
    )
