"""`docs/operations.md`: its commands, as they stand there, from the start of a head to a checked dataset."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_heads import free_port, head_of, session_folder
from running import KEEP_ALL, TIMEOUT_S, rows, write_jpegs
from runs_of_masks import summary_of

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "operations.md").read_text()
SETTINGS, TOKEN, HEAD, SUBMIT, LOOK, FOLLOW, KILL, STOP, LOOK_AGAIN, GO_ON, CHECK = re.findall(
    r"^```sh\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE
)
IMAGES = 160
SHARDS = IMAGES // 8


class Reader:
    """What differs from the page: folders, ports, sizes, and untrained weights."""

    def __init__(self, folder: Path, checkpoint: Path) -> None:
        self.session = session_folder()
        flags = ["--checkpoint", str(checkpoint), *KEEP_ALL[:-1], "4", "--num-workers", "1"]
        self._own = {
            "/data/": f"{folder}/",
            "8265": str(free_port()),
            "ray start --head": "exec ray start --head --num-cpus=2 --port=0 --dashboard-agent-listen-port=0"
            f" --temp-dir={self.session}",
            "--model demo": shlex.join(flags),
        }
        self.environment = {
            "HOME": str(folder),  # where the token lies
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_USAGE_STATS_ENABLED": "0",
        }

    def words(self, block: str) -> list[str]:
        """The shell in a terminal that knows the page's settings, with one of the page's blocks."""
        typed = SETTINGS + block
        for there, here in self._own.items():
            typed = typed.replace(there, here)
        return ["bash", "-euo", "pipefail", "-c", typed]

    def type(self, block: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.words(block),
            check=False,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            cwd=ROOT,
            env=os.environ | self.environment,
        )

    def succeed(self, block: str) -> str:
        """What a block prints."""
        done = self.type(block)
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr


@pytest.fixture
def reader(tmp_path: Path, tiny_checkpoint: Path) -> Iterator[Reader]:
    """Somebody who has followed the page to a head that is up."""
    write_jpegs(tmp_path / "photos", IMAGES)
    reader = Reader(tmp_path, tiny_checkpoint)
    reader.succeed(TOKEN)
    log = tmp_path / "head.log"
    with head_of(reader.words(HEAD), reader.session, log, reader.environment):
        yield reader


@pytest.mark.alone
def test_case_45_ray_job_submit_and_stop_as_the_page_has_it(tmp_path: Path, reader: Reader) -> None:
    reader.succeed(SUBMIT)
    again = reader.type(SUBMIT)
    assert again.returncode != 0
    assert said_on_the_page("Job with submission_id") in again.stderr

    with subprocess.Popen(
        reader.words(FOLLOW), cwd=ROOT, env=os.environ | reader.environment, stdout=subprocess.PIPE, text=True
    ) as following:
        assert following.stdout
        while f"{IMAGES} images in {SHARDS} shards, {SHARDS} to do" not in (seen := following.stdout.readline()):
            assert seen, "the log has ended without the run's line"
        following.terminate()
    status = reader.succeed(LOOK)
    assert "RUNNING" in status
    assert ": running\n" in status

    output = tmp_path / "masks"
    wait_for_file_after(0, output)
    reader.succeed(KILL)
    wait_for_file_after(finished_in(output), output)  # made by another worker
    reader.succeed(STOP)
    status = reader.succeed(LOOK_AGAIN)
    assert ": interrupted\n" in status

    finished = finished_in(output)
    summary = summary_of(output)
    assert 0 < finished < SHARDS, "stopped too late or too early"
    assert (summary["state"], summary["ok"]) == ("interrupted", 8 * finished)
    assert summary["not_done"] == IMAGES - summary["ok"]

    log = reader.succeed(GO_ON)
    assert f"{IMAGES} images in {SHARDS} shards, {SHARDS - finished} to do" in log
    assert said_on_the_page("complete: ") in log
    assert [row["status"] for row in rows(output)] == ["ok"] * IMAGES
    reader.succeed(CHECK)


def finished_in(output: Path) -> int:
    return len(list((output / "masks").glob("part-*.parquet")))


def wait_for_file_after(count: int, output: Path) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while finished_in(output) <= count:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def said_on_the_page(beginning: str) -> str:
    """The words of a line, or in backticks, that begin so."""
    [said] = re.findall(rf"(?:^ *|`)({re.escape(beginning)}[^`\n]*)", PAGE, re.MULTILINE)
    return said


def test_files_and_headings_that_it_links_to_are_there() -> None:
    for file, heading in re.findall(r"\]\(([^)#]+)#?([^)]*)\)", PAGE):
        target = ROOT / "docs" / file
        assert target.exists(), file
        if heading:
            headings = re.findall(r"^#+ (.*)", target.read_text(), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", one).lower().replace(" ", "-") for one in headings}, heading


def test_its_environment_is_json_with_the_terminals_credentials() -> None:
    [flag] = re.findall(r"^ *--runtime-env-json (.*)$", PAGE, re.MULTILINE)
    keys = {"AWS_ACCESS_KEY_ID": "name", "AWS_SECRET_ACCESS_KEY": "secret/+"}
    typed = ["bash", "-c", f"printf %s {flag}"]
    typed_json = subprocess.run(typed, check=True, capture_output=True, text=True, env=os.environ | keys).stdout
    assert json.loads(typed_json) == {"env_vars": keys}
