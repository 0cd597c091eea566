"""`README.md` says what is true: its examples run, and its flags, columns, statuses and codes are the code's."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cyclopts import Parameter
from PIL import Image
from pycocotools import mask as coco
from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo
from running import make_dataset, write_jpegs

from jobs.command import INTERRUPTED
from jobs.evaluate_masks import evaluate_masks
from jobs.report import report
from jobs.seeded_checkpoint import seeded_checkpoint
from jobs.verify_masks import verify_masks
from pipeline import errors
from pipeline.config import EmbeddingsConfig, MasksConfig
from pipeline.curation.config import CurationConfig
from pipeline.evaluation.config import EvaluationConfig
from pipeline.export.config import ExportConfig
from pipeline.manifest import MANIFEST_SCHEMA
from pipeline.storage import canonical_uri
from schemas.embeddings import embeddings_schema
from schemas.masks import MASKS_SCHEMA, Status

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()

# Flags in the README of programs that are not the project's.
OTHER_FLAGS = {"--constraint", "--head", "--address", "--working-dir", "--runtime-env-json"}
# Of the commands whose flags are plain arguments.
VERIFY_FLAGS = {"--output", "--remove-damaged", "--processes"}
SEEDED_FLAGS = {"--output", "--seed", "--image-size"}
MEASURE_FLAGS = {"--input", "--truth", "--limit", "--output"}
REPORT_FLAGS = {"--input", "--output", "--sample", "--outliers", "--seed", "--processes"}

HEIGHT, WIDTH = 40, 60


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def section(title: str) -> str:
    found = re.search(rf"^(#+) {re.escape(title)}\n(.*?)(?=^\1 |^## |\Z)", README, re.DOTALL | re.MULTILINE)
    assert found, f"no section {title}"
    return found[2]


def table(title: str, number: int = 0) -> list[list[str]]:
    """The cells of one of a section's tables, without its header."""
    found = re.findall(r"(?:^\|.*\n)+", section(title), re.MULTILINE)[number]
    rows = [line.strip("|").split("|") for line in found.splitlines()]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def fields(model: type[BaseModel]) -> Iterator[tuple[str, FieldInfo]]:
    """The settings that are flags, by flag."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fields(field.annotation)
        else:
            parameters = [data for data in field.metadata if isinstance(data, Parameter)]
            if not any(parameter.parse is False for parameter in parameters):
                [flag] = [str(n) for p in parameters for n in p.name] or ["--" + name.replace("_", "-")]
                yield flag, field


def flags_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", text))


def a_mask(box: tuple[int, int, int, int], predicted_iou: float) -> dict[str, Any]:
    left, top, right, bottom = box
    pixels = np.zeros((HEIGHT, WIDTH), dtype=np.uint8, order="F")
    pixels[top:bottom, left:right] = 1
    rle = coco.encode(pixels)
    return {
        "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
        "area": int(pixels.sum()),
        "bbox": [left, top, right - left - 1, bottom - top - 1],
        "predicted_iou": predicted_iou,
        "point_coords": [[float(left), float(top)]],
        "stability_score": 0.96,
        "crop_box": [0, 0, WIDTH, HEIGHT],
    }


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small dataset in `out`, as the README's examples expect, in the current folder."""
    small, large = a_mask((2, 3, 12, 13), 0.97), a_mask((5, 5, 55, 35), 0.96)
    unsure = a_mask((0, 0, WIDTH, HEIGHT), 0.9)
    size = {"height": HEIGHT, "width": WIDTH}
    rows = [
        {"image_id": 0, "uri": "a.jpg", "status": Status.EMPTY_FILE, "error": "zero bytes", "masks": []},
        {"image_id": 1, "uri": "b.jpg", "status": Status.OK, "masks": [small, unsure, large], **size},
        {"image_id": 2, "uri": "c.jpg", "status": Status.EMPTY, "masks": [], **size},
    ]
    (tmp_path / "out/masks").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, MASKS_SCHEMA), tmp_path / "out/masks/part-00000.parquet")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "out"


def test_the_first_commands_are_demo_and_test() -> None:
    assert blocks("sh")[0].split("\n") == ["make demo", "make test", ""]
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"demo", "test"} <= set(targets)


@pytest.mark.usefixtures("dataset")
def test_the_reading_example_decodes_the_masks() -> None:
    names: dict[str, Any] = {}
    exec(blocks("python")[0], names)
    assert names["row"]["uri"] == "b.jpg"
    assert names["masks"].shape == (HEIGHT, WIDTH, 3)
    assert names["masks"].sum((0, 1)).tolist() == [mask["area"] for mask in names["row"]["masks"]]


@pytest.mark.usefixtures("dataset")
def test_the_sql_example_finds_the_sure_masks_by_area() -> None:
    [query] = blocks("sql")
    rows = duckdb.sql(query).fetchall()
    assert [row[:2] for row in rows] == [("b.jpg", 1500), ("b.jpg", 100)]
    assert [row[2] for row in rows] == [1500 / (HEIGHT * WIDTH), 100 / (HEIGHT * WIDTH)]
    assert list(rows[1][4]) == [2, 3, 9, 9]


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    seeded_checkpoint(output="seeded.safetensors", image_size=128)
    Image.fromarray(np.full((HEIGHT, WIDTH, 3), 90, dtype=np.uint8)).save("photo.jpg")
    code = blocks("python")[1]
    assert 'load_model("mobile_sam", device="auto")' in code
    exec(code.replace('"mobile_sam", device="auto"', '"seeded.safetensors", device="cpu"'), {})


def test_every_flag_in_the_readme_is_one() -> None:
    configs = (MasksConfig, EmbeddingsConfig, EvaluationConfig, CurationConfig, ExportConfig)
    settings = [found for config in configs for found in fields(config)]
    ours = {flag for flag, _ in settings} | VERIFY_FLAGS | SEEDED_FLAGS | MEASURE_FLAGS | REPORT_FLAGS | {"--help"}
    assert flags_in(README) - ours == OTHER_FLAGS
    sentences = section("Checking a dataset")
    assert flags_in(sentences) == VERIFY_FLAGS


def test_the_flags_named_here_are_the_commands_arguments() -> None:
    for command, flags in (
        (verify_masks, VERIFY_FLAGS),
        (seeded_checkpoint, SEEDED_FLAGS),
        (evaluate_masks, MEASURE_FLAGS),
        (report, REPORT_FLAGS),
    ):
        arguments = {"--" + name.replace("_", "-") for name in command.__annotations__} - {"--return"}
        assert arguments == flags


@pytest.mark.parametrize(("title", "config"), [("Flags", MasksConfig), ("Teacher embeddings", EmbeddingsConfig)])
def test_the_defaults_in_the_tables_of_flags_are_the_settings(title: str, config: type[BaseModel]) -> None:
    settings = dict(fields(config))
    for flag, default, _ in table(title):
        field = settings[flag.strip("`")]
        if default == "required":
            assert field.is_required(), flag
        elif default.startswith("`"):
            assert TypeAdapter(field.annotation).validate_python(default.strip("`")) == field.default, flag
        else:
            assert field.default is None, flag


def test_the_statuses_in_the_readme_are_the_statuses() -> None:
    assert [row[0].strip("`") for row in table("Statuses")] == [str(status) for status in Status]


def test_the_columns_in_the_readme_are_the_schema() -> None:
    documented = [(name.strip("`"), kind.strip("`")) for name, kind, _ in table("Columns of the masks table")]
    assert documented == list(leaves(MASKS_SCHEMA, ""))
    columns = re.search(r"manifest/part-00000\.parquet .*: (.*)", README)
    assert columns
    assert columns[1].split(", ") == MANIFEST_SCHEMA.names


def test_the_flags_of_embedding_are_the_main_jobs_but_for_its_table() -> None:
    documented = [row[0].strip("`") for row in table("Flags")]
    shared = {*documented[: documented.index("--allow-empty") + 1], *documented[documented.index("--model") :]}
    own = {row[0].strip("`") for row in table("Teacher embeddings")}
    assert {flag for flag, _ in fields(EmbeddingsConfig)} == shared | own


def test_the_columns_of_embeddings_in_the_readme_are_the_schema() -> None:
    *documented, tensor = [(row[0].strip("`"), row[1].strip("`")) for row in table("Teacher embeddings", 1)]
    *fields_, embedding = embeddings_schema(1024)
    assert documented == [(field.name, str(field.type)) for field in fields_]
    assert tensor == (embedding.name, "float16[256, S/16, S/16]")
    assert (embedding.type.value_type, embedding.type.shape) == (pa.float16(), [256, 64, 64])


def test_the_examples_read_a_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_checkpoint: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (write_jpegs(Path("photos"), 2) / "0002.jpg").write_bytes(b"")
    config = EmbeddingsConfig(images=canonical_uri("photos"), output=canonical_uri("teacher"))
    make_dataset(config, tiny_checkpoint)
    plain, training = (code for code in blocks("python") if '"teacher' in code)
    names: dict[str, Any] = {}
    exec(plain, names)
    assert names["embeddings"].shape == (2, 256, 4, 4)
    exec(training.replace("1024", "64"), {})
    assert re.findall(r"/(\d+\.jpg) \(48, 64\) \(256, 4, 4\)", capsys.readouterr().out) == ["0000.jpg", "0001.jpg"]


def leaves(struct: Any, prefix: str) -> Iterator[tuple[str, str]]:
    for field in struct:
        name = prefix + field.name
        if pa.types.is_struct(field.type):
            yield from leaves(field.type, f"{name}.")
        else:
            yield name, type_name(field.type)
            if pa.types.is_list(field.type) and pa.types.is_struct(field.type.value_type):
                yield from leaves(field.type.value_type, f"{name}[].")


def type_name(kind: pa.DataType) -> str:
    if pa.types.is_fixed_size_list(kind):
        return f"{type_name(kind.value_type)}[{kind.list_size}]"
    if pa.types.is_list(kind):
        return f"list<{type_name(kind.value_type)}>"
    return "struct" if pa.types.is_struct(kind) else str(kind)


def test_the_exit_codes_in_the_readme_are_the_errors() -> None:
    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    raised = {value.exit_code for value in classes if issubclass(value, errors.EverymaskError)}
    assert {int(row[0]) for row in table("Exit codes")} == raised | {0, INTERRUPTED}


def test_files_that_the_readme_links_to_are_there() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_headings_that_the_readme_links_to_are_there() -> None:
    headings = re.findall(r"^#+ (.*)", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= anchors


def test_the_readme_takes_json_that_is_json() -> None:
    [text] = re.findall(r"--runtime-env-json '([^']+)'", README)
    assert json.loads(text) == {"excludes": ["big-folder"]}
