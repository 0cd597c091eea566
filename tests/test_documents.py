"""What every command says of a dataset that it does not read."""

import json
from pathlib import Path

import pytest
from curated_masks import curated, make, masks_run
from running import call

from schemas import curated as curated_schema
from schemas import masks as masks_schema

VERSIONS = {"masks": masks_schema.SCHEMA_VERSION, "curated": curated_schema.SCHEMA_VERSION}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A curated run, with an input that it does not need any more."""
    make(curated(masks_run(tmp_path, [[]])))
    return tmp_path


@pytest.mark.parametrize("schema", VERSIONS)
@pytest.mark.parametrize(
    "command",
    [
        ("verify_masks", "--output", "DATASET"),
        ("status", "--output", "DATASET"),
        ("curate_masks", "--input", "DATASET", "--output", "OUTPUT"),
        ("export_masks", "--input", "DATASET", "--output", "OUTPUT", "--format", "coco"),
        ("report", "--input", "DATASET", "--output", "OUTPUT"),
        ("evaluate_masks", "--input", "DATASET"),
        ("evaluate_masks", "--input", "SOURCE", "--truth", "DATASET"),
        ("train_model", "--masks", "DATASET", "--output", "OUTPUT", "--minutes", "1"),
    ],
    ids=" ".join,
)
def test_a_newer_schema_is_refused_and_both_versions_named(
    folder: Path, command: tuple[str, ...], schema: str
) -> None:
    document = json.loads((folder / "curated" / "run.json").read_text())
    document["determinants"]["schema"][schema] = VERSIONS[schema] + 1
    (folder / "curated" / "run.json").write_text(json.dumps(document))
    addresses = {"DATASET": folder / "curated", "SOURCE": folder / "masks", "OUTPUT": folder / "output"}
    name, *flags = command
    refused = call(f"jobs.{name}", *(addresses.get(flag, flag) for flag in flags))
    assert refused.returncode == 2, refused.stderr
    version = f"version {VERSIONS[schema] + 1} of the schema of {schema}"
    assert version in refused.stderr
    assert f"reads versions up to {VERSIONS[schema]}. Install a newer one." in refused.stderr
    assert not addresses["OUTPUT"].exists()
