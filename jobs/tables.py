"""Measurements as the commands print and write them."""

import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import torch

import pipeline
from pipeline import storage
from pipeline.errors import SettingsError
from pipeline.evaluation.report import Table, as_json, as_markdown

_FORMATS: Final = {".md": as_markdown, ".json": as_json}


def check_output(output: str | None) -> None:
    """Refuse a file that tables are not written to.

    Raises:
        SettingsError: it ends neither in .md nor in .json.
    """
    if output is not None and Path(output).suffix not in _FORMATS:
        raise SettingsError(f"--output {output}: must end in .md or .json.")


def origin(name: str) -> dict[str, str]:
    """When and by what a table was made, for its header.

    Args:
        name: Of the command, `jobs.NAME`.
    """
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "version": f"everymask {pipeline.__version__}, commit {_commit()}, torch {torch.__version__}",
        "command": f"`python -m {name} {storage.redact(shlex.join(sys.argv[1:]))}`",
    }


def put(header: Mapping[str, str], tables: Sequence[Table], output: str | None) -> None:
    """Print tables as Markdown, and write them to a file if there is to be one."""
    print(as_markdown(header, tables), end="")
    if output is not None:
        storage.write_atomic(output, _FORMATS[Path(output).suffix](header, tables).encode())


def _commit() -> str:
    """The commit of this code, with a plus where files differ from it; `unknown` outside of git."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        described = subprocess.run(git, capture_output=True, text=True, check=True)  # noqa: S603 (nothing of the user's)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return described.stdout.strip()
