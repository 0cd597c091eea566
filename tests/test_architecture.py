"""The import order of the house: a module imports only from modules named before it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

ORDER = [
    "schemas",
    "pipeline",
    "pipeline.config",
    "pipeline.errors",
    "pipeline.cluster",
    "pipeline.storage",
    "pipeline.images",
    "pipeline.decoding",
    "pipeline.sources",
    "pipeline.sorting",
    "pipeline.manifest",
    "pipeline.plan",
    "pipeline.rle",
    "pipeline.memory",
    "pipeline.phases",
    "pipeline.sa1b",
    "pipeline.overlay",
    "pipeline.contents",
    "pipeline.outcomes",
    "pipeline.shard",
    "pipeline.events",
    "pipeline.verify",
    "pipeline.importing",
    "pipeline.documents",
    "pipeline.run",
    "pipeline.reconcile",
    "pipeline.ledger",
    "pipeline.board",
    "pipeline.posting",
    "pipeline.progress_file",
    "pipeline.status",
    "pipeline.progress",
    "pipeline.preemption",
    "pipeline.model",
    "pipeline.phase_clock",
    "pipeline.amg",
    "pipeline.predict",
    "pipeline.curation",
    "pipeline.export",
    "pipeline.reading",
    "pipeline.report",
    "pipeline.estimate",
    "pipeline.tune",
    "pipeline.training",
    "pipeline.evaluation",
    "pipeline.engine_metrics",
    "pipeline.engine_worker",
    "pipeline.engine",
    "pipeline.reading_engine",
    "pipeline.training_engine",
    "pipeline.curation_engine",
    "jobs",
]
WITHOUT_TORCH = set(ORDER[: ORDER.index("pipeline.model")])
MODULES = sorted(path for name in ("schemas", "pipeline", "jobs") for path in (ROOT / name).rglob("*.py"))


def house_of(module: str) -> str:
    """The entry of ORDER that a module belongs to: the longest that names it or a package around it."""
    return max((entry for entry in ORDER if module == entry or module.startswith(f"{entry}.")), key=len)


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> set[str]:
    """Modules that a file imports, at its top or anywhere inside."""
    found = set()
    known = {name_of(module) for module in MODULES}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            assert node.module is not None
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= submodules & known or {node.module}
    return found


def test_every_module_has_a_place() -> None:
    for path in MODULES:
        assert name_of(path) == "pipeline" or house_of(name_of(path)) != "pipeline", path


def test_modules_import_only_from_those_before_them() -> None:
    for path in MODULES:
        own = house_of(name_of(path))
        for imported in imports_of(path):
            if imported.split(".")[0] in {"schemas", "pipeline", "jobs"}:
                assert ORDER.index(house_of(imported)) <= ORDER.index(own), f"{path} imports {imported}"


def test_only_the_engines_and_the_cluster_import_ray() -> None:
    importers = {name_of(path) for path in MODULES if any(i.split(".")[0] == "ray" for i in imports_of(path))}
    assert importers == {
        "pipeline.cluster",
        "pipeline.engine_metrics",
        "pipeline.engine_worker",
        "pipeline.engine",
        "pipeline.reading_engine",
        "pipeline.training_engine",
        "pipeline.curation_engine",
    }


def test_torch_stays_out_of_what_needs_none() -> None:
    for path in MODULES:
        if house_of(name_of(path)) in WITHOUT_TORCH:
            packages = {imported.split(".")[0] for imported in imports_of(path)}
            assert not packages & {"torch", "torchvision", "timm", "segment_anything"}, path


@pytest.mark.parametrize(
    "name", ["verify_masks", "report", "export_masks", "import_sa1b", "curate_masks", "generate_masks", "status"]
)
def test_commands_without_a_model_start_without_its_seconds(name: str) -> None:
    """So does a command that makes masks, until its settings and addresses are found to be right."""
    loaded = f"import sys, jobs.{name}; print({{'torch', 'ray'}} & {{*sys.modules}})"
    said = subprocess.run([sys.executable, "-c", loaded], check=True, capture_output=True, text=True, cwd=ROOT)
    assert said.stdout == "set()\n"


def test_storage_is_the_only_door_to_fsspec() -> None:
    importers = {name_of(path) for path in MODULES if any(i.split(".")[0] == "fsspec" for i in imports_of(path))}
    assert {house_of(name) for name in importers} == {"pipeline.storage"}
