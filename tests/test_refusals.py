"""What cannot work ends a command with its exit code and a word why, before a Ray is started."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
import torch
from running import call, jpeg, write_jpegs


def flags(folder: Path, output: Path, checkpoint: Path) -> list[str | Path]:
    return ["--images", folder, "--output", output, "--checkpoint", checkpoint]


@pytest.fixture(autouse=True)
def _neither_ray_nor_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "init", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize(
    ("changed", "code", "words"),
    [
        (("--points-per-side", "0"), 2, "points_per_side"),
        (("--no-such-flag", "1"), 2, "no-such-flag"),
        (("--images", "nowhere"), 3, "nowhere"),
        (("--checkpoint", "nowhere.pt"), 3, "nowhere.pt"),
        (("--model", "vit_b"), 3, "mobile_sam, not vit_b"),
        (("--device", "cuda"), 2, "GPU"),
        (("--device", "mps"), 2, "mps"),
    ],
)
def test_what_cannot_work_ends_before_ray_is_started(
    tmp_path: Path, tiny_checkpoint: Path, changed: tuple[str, str], code: int, words: str
) -> None:
    folder = write_jpegs(tmp_path / "in", 1)
    given = {"--images": folder, "--output": tmp_path / "out", "--checkpoint": tiny_checkpoint}
    given |= dict([changed])
    refused = call("jobs.generate_masks", *(word for pair in given.items() for word in pair))
    assert refused.returncode == code, refused.stderr
    assert words in refused.stdout + refused.stderr
    assert not (tmp_path / "out" / "masks").exists()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data[:1000], "CheckpointError"),
        (lambda data: b"<html>Sign in</html>", "HTML"),
        (lambda data: data[:-4] + b"\0\0\xc0\x7f", "not finite"),
    ],
    ids=["truncated", "a web page", "no number"],
)
def test_case_40_a_model_that_cannot_be_built_ends_it_once_and_at_once(
    tmp_path: Path, tiny_checkpoint: Path, damage: Callable[[bytes], bytes], words: str
) -> None:
    (tmp_path / "x.safetensors").write_bytes(damage(tiny_checkpoint.read_bytes()))
    folder = write_jpegs(tmp_path / "in", 1)
    refused = call("jobs.generate_masks", *flags(folder, tmp_path / "out", tmp_path / "x.safetensors"))
    assert refused.returncode == 3, refused.stderr
    assert words in refused.stderr
    assert refused.stderr.count("Error: ") == 1
    assert not list((tmp_path / "out").iterdir())


def test_a_store_that_is_too_large_is_refused(tmp_path: Path, tiny_checkpoint: Path) -> None:
    folder = write_jpegs(tmp_path / "in", 2)
    (folder / "0002.jpg").write_bytes(jpeg(2))
    refused = call(
        "jobs.embed_images", *flags(folder, tmp_path / "out", tiny_checkpoint), "--max-bytes", f"{3 * 8192 - 1}"
    )
    assert refused.returncode == 2, refused.stderr
    assert re.search(r"3 images x .* \(24576 bytes\), and --max-bytes allows .* \(24575 bytes\)", refused.stderr)
    assert "ray" not in refused.stderr.lower()
    assert not (tmp_path / "out" / "embeddings").exists()
    assert not (tmp_path / "out" / "summary.json").exists()


@pytest.mark.parametrize("job", ["jobs.embed_images", "jobs.generate_masks"])
def test_a_device_that_is_not_there_ends_it_before_anything_is_read_or_written(
    job: str, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    given = flags(tmp_path / "nowhere", tmp_path / "out", tiny_checkpoint)
    refused = call(job, *given, "--device", "cuda")
    assert refused.returncode == 2, refused.stderr
    assert "There is no GPU here" in refused.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("job", ["jobs.embed_images", "jobs.generate_masks"])
@pytest.mark.parametrize("missing", ["--images", "--checkpoint"])
def test_a_wrong_address_is_refused_before_torch_and_ray_are_imported(
    job: str, missing: str, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    """Importing them takes longer than asking."""
    given = {"--images": write_jpegs(tmp_path / "in", 1), "--checkpoint": tiny_checkpoint}
    given[missing] = tmp_path / "nowhere"
    words = [word for pair in given.items() for word in map(str, pair)]
    code = f"""
import runpy, sys
sys.argv = {[job, *words, "--output", str(tmp_path / "out")]}
try:
    runpy.run_module({job!r}, run_name="__main__")
finally:
    print({{"torch", "ray"}} & sys.modules.keys())
"""
    refused = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert refused.returncode == 3, refused.stderr
    assert "nowhere" in refused.stderr
    assert refused.stdout == "set()\n"
    assert not list((tmp_path / "out").iterdir())
