"""The benchmarks that wait for a GPU, run small on a CPU: they fit the code of today, and say what they claim."""

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import skimage.data
from bsds_folder import write_bsds
from PIL import Image

from pipeline.model.decoder import FastDecoder

Run = Callable[..., str]
BENCHMARKS: Final = Path(__file__).parents[1] / "benchmarks"
SMALL: Final = ("--device", "cpu", "--image-size", "256", "--points-per-side", "4")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a benchmark's `main`, as its command does, and return what it prints."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def run(name: str, *arguments: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        importlib.import_module(name).main()
        return capfd.readouterr().out

    return run


@pytest.fixture(scope="module")
def photograph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    Image.fromarray(skimage.data.coffee()).resize((150, 100)).save(folder / "coffee.png")
    return folder / "coffee.png"


def cells(text: str, *start: str) -> list[str]:
    """The further cells of the one row of a table that begins with these."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    (found,) = [row[len(start) :] for row in rows if tuple(row[: len(start)]) == start]
    return found


def test_gpu_checks_and_then_times(run: Run, photograph: Path, tmp_path: Path) -> None:
    output = tmp_path / "gpu.md"
    text = run("gpu", "--images", photograph.parent, *SMALL, "--rounds", "1", "--output", output)
    assert text.strip() in output.read_text()
    tables = text.split("\n\n")
    for precision, largest in (("fp32", 1e-5), ("bf16", 0.03)):
        assert all(0 < float(error) <= largest for error in cells(tables[1], precision))
        assert all(float(ms) > 0 for ms in cells(tables[2], precision))
    rows = {name: cells(tables[3], name) for name in ("mobile_sam, fp32", "everymask, fp32", "everymask, bf16")}
    for ms, ratio, a_second, masks, *_ in rows.values():
        assert float(a_second) == pytest.approx(1e3 / float(ms), rel=0.1)
        assert float(ratio) == pytest.approx(float(rows["mobile_sam, fp32"][0]) / float(ms), abs=0.1)
        assert int(masks) > 0
    assert rows["mobile_sam, fp32"][3] == rows["everymask, fp32"][3]


def test_gpu_times_no_wrong_answers(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    right = FastDecoder.upscale

    def leaves_a_mask_out(self: FastDecoder, image: Any, tokens: Any, weights: Any, logits: Any) -> None:
        right(self, image, tokens, weights[:, :-1], logits[:, :-1])

    monkeypatch.setattr(FastDecoder, "upscale", leaves_a_mask_out)
    with pytest.raises(SystemExit, match=r"nan[^|]*\|[^|]*\|\n\nwrong answers: not timed"):
        run("gpu", *SMALL)


def test_parity_of_both_precisions(run: Run, photograph: Path) -> None:
    settings = ("--checkpoint", "demo", "--settings", "defaults", "--precision", "both")
    text = run("parity", "--images", photograph.parent, *settings, *SMALL)
    exact, fast = text.split("\nfp32\n")[1].split("\nbf16\n")
    masks, same, in_order, *_ = cells(exact, "coffee.png", "150 x 100", "defaults")
    reference, ours = map(int, masks.split("/"))
    assert reference == ours > 0
    assert (same, in_order) == ("yes", "yes")
    matched, iou, unmatched, *_ = cells(fast, "coffee.png", "150 x 100", "defaults")[1:]
    assert int(matched) > 0
    assert 0.9 < float(iou) <= 1
    assert re.fullmatch(r"[\d.]+ %", unmatched)


def test_agreement_of_precisions_and_with_the_reference(run: Run, photograph: Path, tmp_path: Path) -> None:
    rgb = np.array(Image.open(photograph))
    label_map = np.ones(rgb.shape[:2], np.uint16)
    label_map[20:70, 30:100] = 2
    folder = write_bsds(tmp_path / "bsds", {"coffee": (rgb, [label_map])})
    text = run("agreement", "--bsds", folder, "--reference", "1", *SMALL)
    for masks_of, against, least in (("bf16", "fp32", 0.9), ("fp32", "mobile_sam", 0.999)):
        photographs, masks, iou, without, others, *_ = cells(text, masks_of, against)
        ours, theirs = map(int, masks.split(" / "))
        assert min(ours, theirs) > 0
        assert least < float(iou) <= 1
        assert (photographs, without, others) == ("1", "0.00 %", "0")
