"""The documents that say what run an output holds: `run.json`, and before it `plan.json`."""

import json
import re
from collections.abc import Iterator
from typing import Any, Final, get_args

from pipeline import storage
from pipeline.config import Kind
from pipeline.errors import OutputConflict, SettingsError
from schemas import curated, embeddings, manifest, masks

RUN: Final = "run.json"
"""Written after the manifest: where it stands, the manifest is whole."""
PLAN: Final = "plan.json"
"""In its place while shards are made of images that are still listed: how much of the manifest is final."""

_READABLE: Final[dict[str, int]] = {
    "manifest": manifest.SCHEMA_VERSION,
    "masks": masks.SCHEMA_VERSION,
    "embeddings": embeddings.SCHEMA_VERSION,
    "curated": curated.SCHEMA_VERSION,
}
"""The newest version of each schema that this everymask reads."""
_PART: Final = re.compile(r"part-(\d{5,})\.parquet")


def document_there(output: str) -> str | None:
    """Which of the two documents says what run the output holds."""
    in_turn = (RUN, PLAN, RUN)  # again, as it may have taken the other's place meanwhile
    return next((name for name in in_turn if storage.exists(f"{output}/{name}")), None)


def read_document(output: str, *, unlisted: bool = False) -> dict[str, Any]:
    """What `run.json` says.

    Args:
        output: The run's.
        unlisted: Whether a run whose images are still listed will do; its `manifest` counts what is final.

    Raises:
        OutputConflict: the output holds no run, or a damaged `run.json`.
        SettingsError: it has a newer schema than this version reads.
        StorageError: it cannot be read.
    """
    name = document_there(output)
    if name is None:
        raise OutputConflict(f"{storage.redact(output)} holds no run: there is no run.json.")
    if name == PLAN and not unlisted:
        raise OutputConflict(
            f"{storage.redact(output)} holds a run whose images are still being listed, or whose listing was cut "
            "short: there is no run.json yet. The command that began it goes on where it is repeated."
        )
    document = read(output, name)
    for schema, version in document["determinants"]["schema"].items():
        if version > _READABLE.get(schema, version):
            raise SettingsError(
                f"{storage.redact(output)} has version {version} of the schema of {schema}, and this everymask "
                f"reads versions up to {_READABLE[schema]}. Install a newer one."
            )
    return document


def read(output: str, name: str) -> dict[str, Any]:
    """One of the two.

    Raises:
        OutputConflict: it is damaged.
        StorageError: it cannot be read.
    """
    uri = f"{output}/{name}"
    try:
        document: dict[str, Any] = json.loads(storage.read_bytes(uri))
        _ = kind_of(document), document["fingerprint"]
        _ = [document["manifest"][name] for name in ("images", "shards", "duplicates", "skipped", "digest")]
    except (ValueError, LookupError, TypeError, AttributeError, StopIteration) as error:
        raise OutputConflict(
            f"{storage.redact(uri)} is damaged ({error!r}). Choose another output, or delete that file and pass "
            "--overwrite to start anew."
        ) from error
    return document


def read_masks(output: str) -> dict[str, Any]:
    """What `run.json` says of a run of masks; some of its shards may be missing.

    Raises:
        OutputConflict: the output holds no run, one of another kind, or a damaged `run.json`.
        SettingsError: it has a newer schema than this version reads.
        StorageError: it cannot be read.
    """
    document = read_document(output)
    if (kind := kind_of(document)) != "masks":
        raise OutputConflict(f"{storage.redact(output)} holds no masks but {kind}.")
    return document


def read_finished_masks(output: str) -> dict[str, Any]:
    """What `run.json` says of a run of masks whose shards all have a file.

    Raises:
        OutputConflict, StorageError: as `read_masks`.
        SettingsError: as `read_masks`, or shards are missing.
    """
    document = read_masks(output)
    shards = document["manifest"]["shards"]
    if missing := set(range(shards)) - shards_done(output, "masks"):
        raise SettingsError(
            f"{storage.redact(output)} is not finished: {len(missing)} of {shards} shards have no file, the first "
            f"is {min(missing)}. Repeat the command that made the others."
        )
    return document


def kind_of(document: dict[str, Any]) -> Kind:
    """What the run of a `run.json` makes."""
    kind: Kind = next(kind for kind in get_args(Kind) if kind in document["determinants"]["schema"])
    return kind


def shards_done(output: str, kind: Kind) -> set[int]:
    """The shards that have a file."""
    return set(parts(f"{output}/{kind}"))


def parts(folder: str) -> Iterator[int]:
    """The numbers of a folder's `part-NNNNN.parquet`, in no order."""
    for name in storage.list_names(folder):
        if match := _PART.fullmatch(name):
            yield int(match[1])


def conflict(output: str, document: dict[str, Any], own: str, determinants: dict[str, Any]) -> str:
    """What to say where an output's document has another fingerprint: both, and what they differ in."""
    theirs, ours = _flat(document["determinants"]), _flat(determinants)
    differing = [
        f"{key} ({theirs.get(key)} there, {ours.get(key)} here)"
        for key in sorted(theirs.keys() | ours.keys())
        if theirs.get(key) != ours.get(key)
    ]
    return (
        f"{storage.redact(output)} holds another run: its fingerprint is {document['fingerprint']}, this run's "
        f"{own}. They differ in {', '.join(differing)}. Choose another output, or pass --overwrite to delete it."
    )


def _flat(document: dict[str, Any]) -> dict[str, Any]:
    nested = [(key, value if isinstance(value, dict) else {"": value}) for key, value in document.items()]
    return {f"{key}.{name}".rstrip("."): item for key, items in nested for name, item in items.items()}


def redacted(value: Any) -> Any:
    """JSON whose texts have no credentials; `storage.redact` says which."""
    if isinstance(value, dict):
        return {key: redacted(item) for key, item in value.items()}
    return storage.redact(value) if isinstance(value, str) else value


def as_json(document: Any) -> bytes:
    """A document as this project writes them."""
    return (json.dumps(document, indent=2) + "\n").encode()
