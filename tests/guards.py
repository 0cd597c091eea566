"""Each guard of docs/reliability.md taken away, one at a time: its test must fail.

    python tests/guards.py [--case 5 23]

In a copy of the tracked files a line of the program is changed, as a careless edit might, and the tests that stand
for the case are run. A row of a Markdown table each; exit code 1 where a test passes all the same.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

ROOT: Final = Path(__file__).parent.parent
TESTS_FAILED: Final = 1
"""pytest's exit code; others say that the tests could not be run."""


class Guard(NamedTuple):
    """What is there once in a file of the program, what is put in its place, and whose case it was there for."""

    case: int
    file: str
    line: str
    instead: str


GUARDS: Final = [
    Guard(1, "pipeline/images.py", "    if not data:\n", "    if data is None:\n"),
    Guard(2, "pipeline/images.py", "LOAD_TRUNCATED_IMAGES = False", "LOAD_TRUNCATED_IMAGES = True"),
    Guard(3, "pipeline/images.py", "ImageError(Status.NOT_AN_IMAGE, f", "ImageError(Status.TRUNCATED, f"),
    Guard(4, "pipeline/images.py", 'rb"\\x89PNG\\r\\n\\x1a\\n"', 'rb"\\x89PNG only"'),
    Guard(5, "pipeline/images.py", "if width * height > max_pixels:", "if width > max_pixels:"),
    Guard(6, "pipeline/images.py", "    6: Image.Transpose.ROTATE_270,", "    6: Image.Transpose.ROTATE_90,"),
    Guard(7, "pipeline/images.py", "    except _UNREADABLE:\n", "    except KeyError:\n"),
    Guard(8, "pipeline/images.py", 'and "adobe" not in image.info', 'and "adobe" in image.info'),
    Guard(9, "pipeline/images.py", '{"1", "L", "P", "CMYK", "YCbCr"}', '{"1", "L", "CMYK", "YCbCr"}'),
    Guard(10, "pipeline/images.py", 'Image.new("RGB", image.size, "white")', 'Image.new("RGB", image.size)'),
    Guard(11, "pipeline/images.py", "* 255 + top // 2) // top)", "* 255 + top // 2) // 4095)"),
    Guard(12, "pipeline/images.py", '{"1", "L", "P", "CMYK", "YCbCr"}', '{"1", "L", "P", "CMYK", "YCbCr", "F"}'),
    Guard(13, "pipeline/images.py", "if bands > 4:", "if bands > 40:"),
    Guard(14, "pipeline/images.py", "        image.load()\n", "        image.seek(1)\n        image.load()\n"),
    Guard(15, "pipeline/images.py", "if not _DECODERS.get(kind, True):", 'if kind == "none":'),
    Guard(
        16,
        "pipeline/amg/generator.py",
        "if crop_box[0] < crop_box[2] and crop_box[1] < crop_box[3]",
        "if crop_box[0] < crop_box[2] - 1",
    ),
    Guard(17, "pipeline/amg/selection.py", "while len(left_N) or not kept:", "while len(left_N):"),
    Guard(18, "pipeline/amg/resize.py", "memory_budget // one_mask", "2**40 // one_mask"),
    Guard(19, "pipeline/amg/selection.py", "while len(left_N) or not kept:", "while len(left_N):"),
    Guard(20, "pipeline/rle.py", "[0, *counts] if pixels[0] else counts", "counts"),
    Guard(21, "pipeline/amg/regions.py", 'min_area, mode="islands"', 'min_area, mode="holes"'),
    Guard(22, "pipeline/run.py", "is None and not config.allow_empty:", "is None and config.allow_empty:"),
    Guard(23, "pipeline/run.py", '        storage.write_atomic(probe, b"")\n        storage.delete(probe)\n', ""),
    Guard(23, "pipeline/storage/attempts.py", "min(ATTEMPTS_TOTAL_S, _at_most_s.get())", "ATTEMPTS_TOTAL_S"),
    Guard(
        24,
        "pipeline/sources/fetching.py",
        "    except StorageError as error:\n",
        "    except KeyError as error:\n",
    ),
    Guard(25, "pipeline/storage/attempts.py", "stop_after_attempt(ATTEMPTS)", "stop_after_attempt(1)"),
    Guard(25, "pipeline/storage/attempts.py", "if names & _TRANSIENT_NAMES or", "if"),
    Guard(
        26,
        "pipeline/sources/listing.py",
        "ImageRef(*file, None, None)",
        'ImageRef(file.uri.rpartition("/")[2], *file[1:], None, None)',
    ),
    Guard(
        27,
        "pipeline/storage/__init__.py",
        "    return f\"{head}://{path.rstrip('/')}\"",
        '    return address.split("#")[0]',
    ),
    Guard(
        28,
        "pipeline/sources/listing.py",
        "                _skip(skipped, label_of(file.uri))\n",
        "                pass\n",
    ),
    Guard(
        29,
        "pipeline/sources/fetching.py",
        "    if ref.size is not None and len(data) != ref.size:\n        found",
        "    if ref.size == -1:\n        found",
    ),
    Guard(30, "pipeline/run.py", "if storage.is_inside(config.output, config.images):", "if not config.output:"),
    Guard(31, "pipeline/run.py", 'if document["fingerprint"] != own:', 'if document["fingerprint"] == "":'),
    Guard(32, "pipeline/manifest.py", "pc.equal(uri, before)", 'pc.equal(uri, "")'),
    Guard(33, "pipeline/sources/containers.py", ' or ".." in member.name.split("/")', ""),
    Guard(
        33,
        "pipeline/sources/containers.py",
        "        if stream.read(tarfile.BLOCKSIZE) != bytes(",
        "        if b'' != bytes(0 * ",
    ),
    Guard(34, "pipeline/outcomes.py", '        "error": None,\n', '        "error": str(time.monotonic()),\n'),
    Guard(
        35, "pipeline/reconcile.py", "for shard in range(run.shards) if", "for shard in range(run.shards - 1) if"
    ),
    Guard(
        37,
        "pipeline/storage/local.py",
        '".{path.name}.{uuid.uuid4().hex}.tmp"',
        '".{path.name}.tmp"',
    ),
    Guard(38, "pipeline/amg/generator.py", "if stop - start == 1 or not is_out_of_memory(error):", "if stop:"),
    Guard(38, "pipeline/outcomes.py", "        if not is_out_of_memory(error):\n", "        if error:\n"),
    Guard(39, "pipeline/decoding.py", "        signal.setitimer(signal.ITIMER_REAL, seconds)\n", ""),
    Guard(
        39,
        "pipeline/decoding.py",
        "            except _Death as death:\n",
        "            except KeyError as death:\n",
    ),
    Guard(
        40,
        "pipeline/model/weights.py",
        '    if data[:512].lstrip()[:1] == b"<":',
        '    if data[:512].lstrip()[:1] == b"no":',
    ),
    Guard(41, "pipeline/engine.py", "and failed > max_rate * images:", "and failed > images:"),
    Guard(42, "pipeline/model/weights.py", '"cpu", weights_only=True', '"cpu", weights_only=False'),
    Guard(
        42,
        "pipeline/model/weights.py",
        "(found := _sha256(download)) != sha256:",
        "(found := _sha256(download)) == '':",
    ),
    Guard(43, "pipeline/verify.py", "        if not storage.exists(uri):\n", "        if not uri:\n"),
    Guard(
        44,
        "pipeline/outcomes.py",
        "        yield image, _outcome(image.row, rgb_HW3, rest, content)\n",
        "        yield image, _outcome(image.row, rgb_HW3, rest, content)\n"
        "        content.of_failure.setdefault('kept', []).append(rgb_HW3.result())\n",
    ),
    Guard(
        45,
        "jobs/command.py",
        "    signal.signal(signal.SIGTERM, _interrupt)",
        "    signal.getsignal(signal.SIGTERM)",
    ),
    Guard(45, "jobs/dataset.py", '        KeyboardInterrupt: "interrupted",\n', ""),
    Guard(46, "pipeline/amg/selfcheck.py", "if not model.weights_sha256:", "if model.weights_sha256 is None:"),
    Guard(46, "pipeline/amg/selfcheck.py", "    _check_frame(masks, iou_N3, corner + points)\n", ""),
]
"""Of every case; the engine's are those of 34, 35 and 36 as well, whose tests are the same."""


def nodes_of(case: int) -> list[str]:
    """The tests that docs/reliability.md names for a case, as pytest's node ids."""
    text = (ROOT / "docs" / "reliability.md").read_text()
    [row] = re.findall(rf"^\| {case} \|.*`test_.*$", text, re.MULTILINE)
    return [node for name in re.findall(r"`(test_\w+)`", row) for node in _nodes(name)]


def _nodes(name: str) -> Iterator[str]:
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        if re.search(rf"^def {name}\(", path.read_text(), re.MULTILINE):
            yield f"tests/{path.name}::{name}"


def outcome(guard: Guard, folder: Path) -> int:
    """pytest's exit code for the case's tests, without the guard."""
    path = folder / guard.file
    whole = path.read_text()
    path.write_text(whole.replace(guard.line, guard.instead))
    try:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *nodes_of(guard.case)]
        done = subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True)
    finally:
        path.write_text(whole)
    if done.returncode != TESTS_FAILED:
        print(done.stdout[-2000:], done.stderr[-2000:], file=sys.stderr)
    return done.returncode


def copy_of_the_project(folder: Path) -> None:
    """The tracked files, as they are now."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)


def main() -> None:
    """Take the guards away that the command line names, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", type=int, nargs="+", default=list(range(1, 47)))
    asked = parser.parse_args()
    print("| Case | In | Instead of | Tests |\n|---|---|---|---|")
    passed = 0
    with tempfile.TemporaryDirectory(prefix="guards-") as name:
        copy_of_the_project(Path(name))
        for guard in GUARDS:
            if guard.case in asked.case:
                code = outcome(guard, Path(name))
                passed += code != TESTS_FAILED
                line = guard.line.strip().splitlines()[0].replace("|", "\\|")
                said = "fail" if code == TESTS_FAILED else f"**exit code {code}**"
                print(f"| {guard.case} | {guard.file} | `{line}` | {said} |", flush=True)
    sys.exit(passed > 0)


if __name__ == "__main__":
    main()
