"""Decoding in processes of its own: the same pixels, and what takes a process down is a row among others."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from poisoned import poisoned, write_plugin
from running import jpeg, processes_with, rows, write_jpegs

from pipeline import manifest, sources
from pipeline.config import AmgConfig, ImagesConfig, MasksConfig
from pipeline.decoding import Decoders
from pipeline.errors import ImageError
from pipeline.images import decode_image
from pipeline.model import load_model
from pipeline.predict import content_of
from pipeline.shard import make_shard
from schemas.masks import Status

LIMITS = ImagesConfig(decode_timeout=2, decode_memory="512MiB", max_pixels=10**7)


@pytest.fixture
def decoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Decoders]:
    """With the decoder that poisoned images take down, in the children alone."""
    monkeypatch.syspath_prepend(write_plugin(tmp_path / "plugin"))
    with Decoders(LIMITS) as decoders:
        yield decoders


def refusal(decoders: Decoders, data: bytes) -> tuple[Status, str]:
    with pytest.raises(ImageError) as caught:
        decoders(data)
    return caught.value.status, str(caught.value)


def children() -> set[int]:
    """Of this process."""
    return {one.pid for one in processes_with("-m pipeline.decoding") if one.parent == os.getpid()}


def test_pixels_and_refusals_are_those_of_this_process(decoders: Decoders) -> None:
    for data in (jpeg(0), jpeg(1, (200, 300)), poisoned("is harmless")):
        rgb_HW3 = decoders(data)
        assert np.array_equal(rgb_HW3, decode_image(data, max_pixels=10**7))
        assert (rgb_HW3.dtype, rgb_HW3.flags.c_contiguous, rgb_HW3.flags.writeable) == (np.uint8, True, True)
    for data in (b"", b"<html>", jpeg(0)[:900], b"\xff\xd8\xff" + "ä\n".encode() * 10**5):
        with pytest.raises(ImageError) as here:
            decode_image(data, max_pixels=10**7)
        assert refusal(decoders, data) == (here.value.status, str(here.value))
    assert len(children()) == 1


def test_pixels_outlive_the_next_image_and_the_child() -> None:
    with Decoders(LIMITS) as decoders:
        first, second = decoders(jpeg(0)), decoders(jpeg(1))
    assert not children()
    assert np.array_equal(first, decode_image(jpeg(0), max_pixels=10**7))
    first[:] = 0  # memory of its own
    assert np.array_equal(second, decode_image(jpeg(1), max_pixels=10**7))


@pytest.mark.parametrize(
    ("how", "status", "words"),
    [
        ("segfaults", Status.DECODER_CRASH, "its decoder ended by SIGSEGV, twice"),
        ("aborts", Status.DECODER_CRASH, "its decoder ended by SIGABRT, twice"),
        ("hangs", Status.TIMEOUT, "more than 2 seconds, twice; --decode-timeout"),
        ("hoards", Status.OUT_OF_MEMORY, "no memory to decode this PPM image"),
        ("is killed", Status.OUT_OF_MEMORY, "its decoder was killed, twice"),
    ],
)
def test_case_39_what_takes_a_decoder_down_is_said(
    decoders: Decoders, how: str, status: Status, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    found, message = refusal(decoders, poisoned(how))
    assert (found, words in message) == (status, True), message
    assert decoders(jpeg(0)).shape == (96, 128, 3)
    assert len(children()) == 1
    assert "Traceback" not in capfd.readouterr().err


def test_case_39_the_rest_of_the_shard_is_done(tmp_path: Path, decoders: Decoders, tiny_checkpoint: Path) -> None:
    folder = write_jpegs(tmp_path / "in", 6)
    for name, how in {"0001a": "segfaults", "0002a": "hangs", "0004a": "hoards"}.items():
        (folder / f"{name}.ppm").write_bytes(poisoned(how))
    amg = AmgConfig(points_per_side=1, pred_iou_thresh=-10, stability_score_thresh=0)
    config = MasksConfig(images=folder.as_uri(), output=(tmp_path / "out").as_uri(), amg=amg)
    manifest.write_manifest(sources.find_images(config.images, Counter()), config.output, images_per_shard=9)
    summary = make_shard(0, config, content_of(config, load_model(str(tiny_checkpoint))), decoders, {})
    assert {Path(row["uri"]).name: row["status"] for row in rows(tmp_path / "out") if row["error"]} == {
        "0001a.ppm": "decoder_crash",
        "0002a.ppm": "timeout",
        "0004a.ppm": "out_of_memory",
    }
    assert (summary.images, summary.statuses["ok"]) == (9, 6)


def test_an_image_at_whose_side_a_decoder_died_once_is_tried_again(decoders: Decoders, tmp_path: Path) -> None:
    """As where the machine's memory ran out by another's doing."""
    data = poisoned(f"segfaults unless {tmp_path}/marker")
    assert np.array_equal(decoders(data), decode_image(data, max_pixels=10**7))
    decoders(jpeg(0))
    [child] = children()
    os.kill(child, signal.SIGKILL)
    assert decoders(jpeg(0)).shape == (96, 128, 3)


def test_threads_have_a_child_each(decoders: Decoders) -> None:
    files = [jpeg(index) for index in range(24)]
    with ThreadPoolExecutor(3) as pool:
        decoded = list(pool.map(decoders, files))
    assert 1 <= len(children()) <= 3
    for data, rgb_HW3 in zip(files, decoded, strict=True):
        assert np.array_equal(rgb_HW3, decode_image(data, max_pixels=10**7))


def test_a_child_that_cannot_start_is_an_error_and_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "PIL.py").write_text("import absent")
    monkeypatch.syspath_prepend(tmp_path)
    with Decoders(LIMITS) as decoders, pytest.raises(RuntimeError, match=r"no decoder could be started.*code 1"):
        decoders(jpeg(0))


PARENT = """
import os, signal, sys, threading, time
sys.path[:0] = [{tests!r}, {plugin!r}]
from poisoned import poisoned
from pipeline.config import ImagesConfig
from pipeline.decoding import Decoders
from running import jpeg
with Decoders(ImagesConfig(decode_timeout=3)) as decoders:
    decoders(jpeg(0))
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()
    if {hangs}:
        decoders(poisoned("hangs"))
    time.sleep(60)
"""


@pytest.mark.parametrize("hangs", [False, True])
def test_no_child_outlives_its_parent_by_more_than_the_limit(tmp_path: Path, hangs: bool) -> None:
    plugin = str(write_plugin(tmp_path / "plugin"))
    program = PARENT.format(tests=str(Path(__file__).parent), plugin=plugin, hangs=hangs)
    parent = subprocess.Popen([sys.executable, "-c", program])
    found: set[int] = set()
    while parent.poll() is None:
        found |= {one.pid for one in processes_with("-m pipeline.decoding") if one.parent == parent.pid}
        time.sleep(0.05)
    assert found
    deadline = time.monotonic() + 60
    while any(one.pid in found for one in processes_with("-m pipeline.decoding")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
