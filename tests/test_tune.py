"""jobs.tune: every combination once, numbers of the masks themselves, and a sheet of the overlays."""

import re
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from drawn_masks import DrawnModel, coordinates_as_colours
from PIL import Image
from pycocotools import mask as coco
from running import call, write_jpegs

from pipeline.amg import MaskGenerator
from pipeline.errors import SettingsError
from pipeline.model.sam import SamModel
from pipeline.tune import Setting, contact_sheet, grid_of, try_settings

MODEL = cast(SamModel, DrawnModel())
IMAGES = [coordinates_as_colours(120, 200), coordinates_as_colours(240, 160)]


def test_the_grid_is_every_combination() -> None:
    assert grid_of([4], [0.5, 0.6], [0.7, 0.8]) == [
        Setting(4, 0.5, 0.7),
        Setting(4, 0.5, 0.8),
        Setting(4, 0.6, 0.7),
        Setting(4, 0.6, 0.8),
    ]
    assert grid_of([1, 2], None, []) == [Setting(1, None, None), Setting(2, None, None)]
    for points in ([], range(1, 102)):
        with pytest.raises(SettingsError, match=f"^{len(points)} settings"):
            grid_of(list(points), None, None)


def test_numbers_are_those_of_the_masks() -> None:
    settings = [Setting(4, 0.6, 0.3), Setting(4, None, 0.9)]
    for setting, tried in zip(settings, try_settings(MODEL, IMAGES, settings), strict=True):
        arguments = setting._asdict()
        made = [MaskGenerator(MODEL, **arguments).generate(rgb) for rgb in IMAGES]
        masks = [mask for of_image in made for mask in of_image]
        assert tried.setting == Setting(4, setting.pred_iou_thresh or 0.88, setting.stability_score_thresh)
        assert tried.masks == len(masks) / 2 > 2
        covered = [np.any(coco.decode([m["segmentation"] for m in of_image]), axis=2).mean() for of_image in made]
        assert tried.coverage == pytest.approx(np.mean(covered))
        assert tried.stability == pytest.approx(np.mean([mask["stability_score"] for mask in masks]))
        assert tried.seconds > 0
        counts = sum(len(mask["segmentation"]["counts"]) for mask in masks)
        assert counts / 20 < tried.bytes * 2 < counts + 500 * len(masks)


def test_a_setting_without_masks_has_no_stability() -> None:
    [tried] = try_settings(MODEL, IMAGES, [Setting(2, 2.0, 0.0)])
    assert (tried.masks, tried.coverage, tried.stability) == (0, 0, None)


def test_the_sheet_has_a_row_a_setting_and_a_column_an_image() -> None:
    """An image of one colour in each place; masks would tint it, so there are none."""
    colours = [(200, 0, 0), (0, 0, 200)]
    images = [np.full((90, 120, 3), colour, np.uint8) for colour in colours]
    sheet = contact_sheet(list(try_settings(MODEL, images, [Setting(1, 2.0, 0.0), Setting(2, 2.0, 0.0)])))
    assert sheet.size == (480, 412)
    for top in (0, 206):
        for left, colour in zip((0, 240), colours, strict=True):
            assert sheet.getpixel((left + 120, top + 26 + 90)) == colour
        assert np.array(sheet)[top : top + 26].min() < 50, "no caption"


def test_the_command_writes_both_and_passes_over_what_cannot_be_read(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    images = write_jpegs(tmp_path / "in", 2)
    (images / "bad.jpg").write_bytes(b"no image")
    flags = ("--images", images, "--output", tmp_path / "out", "--checkpoint", tiny_checkpoint)
    grid = ("--points-per-side", "1", "--points-per-side", "2", "--pred-iou-thresh", "-10")
    result = call("jobs.tune", *flags, *grid, "--stability-score-thresh", "0")
    assert result.returncode == 0, result.stderr
    assert "bad.jpg" in result.stderr
    text = (tmp_path / "out/settings.md").read_text()
    assert result.stdout.strip() == text.strip()
    assert re.findall(r"^\| (\d+) \| (\d+) \| -10 \| 0 \| ", text, re.MULTILINE) == [("1", "1"), ("2", "2")]
    assert text.count("in/000") == 2
    with Image.open(tmp_path / "out/contact-sheet.jpg") as sheet:
        assert sheet.size == (480, 412)


def test_settings_and_addresses_that_cannot_be_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/bad.jpg").write_bytes(b"no image")
    flags = ("--output", tmp_path / "out", "--checkpoint", tiny_checkpoint)
    result = call("jobs.tune", "--images", tmp_path / "in", *flags)
    assert result.returncode == 3
    assert "None of 1 images" in result.stderr
    assert call("jobs.tune", "--images", tmp_path / "nowhere", *flags).returncode == 3
    assert call("jobs.tune", "--images", tmp_path / "in", *flags, "--points-per-side", "0").returncode == 2
    assert not (tmp_path / "out").exists()
