"""The `Dockerfile`, as far as it can be checked without building an image."""

import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).parent.parent


@pytest.fixture(name="steps")
def parsed_steps(tmp_path: Path) -> list[dict[str, Any]]:
    """The instructions, in order."""
    copy = tmp_path / "Dockerfile"
    copy.write_text((ROOT / "Dockerfile").read_text())
    return [step for step in DockerfileParser(str(copy)).structure if step["instruction"] != "COMMENT"]


def values(steps: list[dict[str, Any]], instruction: str) -> list[str]:
    return [step["value"] for step in steps if step["instruction"] == instruction]


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def sources(steps: list[dict[str, Any]]) -> set[str]:
    return {word for value in values(steps, "COPY") for word in value.split()[:-1]}


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_it_copies_what_the_project_is_made_of_and_nothing_else(steps: list[dict[str, Any]]) -> None:
    settings = project()
    packages = {name.partition(".")[0] for name in settings["tool"]["setuptools"]["packages"]}
    needed = packages | {"pyproject.toml", "constraints.txt", settings["project"]["readme"]}
    assert sources(steps) == needed | set(settings["project"]["license-files"])
    assert all((ROOT / source).exists() for source in sources(steps))


def test_docker_is_sent_what_is_copied_and_nothing_else(steps: list[dict[str, Any]]) -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert rules[0] == "*"
    assert {rule.removeprefix("!") for rule in rules if rule.startswith("!")} == sources(steps)


def test_it_installs_as_the_readme_says(steps: list[dict[str, Any]]) -> None:
    [install] = [value for value in values(steps, "RUN") if "pip install" in value]
    assert 'pip install --no-cache-dir --constraint constraints.txt ".[$EXTRAS]"' in install
    assert "pip install --constraint constraints.txt '.[s3]'" in (ROOT / "README.md").read_text()
    [extras] = [value.partition("=")[2].split(",") for value in values(steps, "ARG") if value.startswith("EXTRAS")]
    assert set(extras) <= set(project()["project"]["optional-dependencies"])
    assert {"s3", "gcs", "azure"} <= set(extras)
    [python] = [value.partition("=")[2] for value in values(steps, "ARG") if value.startswith("PYTHON")]
    assert project()["project"]["requires-python"] == f">={python}"


def test_its_user_is_not_root(steps: list[dict[str, Any]]) -> None:
    [user] = values(steps, "USER")
    assert user == "1000"
    kinds = [step["instruction"] for step in steps]
    assert kinds.index("USER") < kinds.index("ENTRYPOINT")


def test_what_it_runs_is_there(steps: list[dict[str, Any]]) -> None:
    [entrypoint] = values(steps, "ENTRYPOINT")
    found = re.fullmatch(r'\["python", "-m", "(.+)"\]', entrypoint)
    assert found
    assert find_spec(found[1])
    [weights] = [value for value in values(steps, "RUN") if "load_model" in value]
    assert "from pipeline.model import load_model; load_model('mobile_sam', 'cpu')" in weights


def test_kuberay_finds_its_tools(steps: list[dict[str, Any]]) -> None:
    [packages] = [value for value in values(steps, "RUN") if "apt-get install" in value]
    assert {"wget", "procps"} <= set(packages.split())


def test_the_decoders_kernels_find_a_compiler(steps: list[dict[str, Any]]) -> None:
    [packages] = [value for value in values(steps, "RUN") if "apt-get install" in value]
    assert {"gcc", "g++", "libc6-dev"} <= set(packages.split())
