"""A run begun, or taken up: its manifest and its `run.json`. `pipeline.reconcile` has its end.

There is no other state. What is done is the shards that have a file; the manifest is written once; `run.json`
comes after the manifest, so where it stands the manifest is whole.
"""

import json
import re
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Generic, Protocol, get_args

from typing_extensions import TypeVar  # with a default, as of Python 3.13

import pipeline
from pipeline import manifest, sources, storage
from pipeline.config import Kind, LoadedWeights, RunConfig, fingerprint
from pipeline.errors import NoImages, OutputConflict, SettingsError
from pipeline.manifest import ManifestInfo

_PART: Final = re.compile(r"part-(\d{5,})\.parquet")
_ID_LENGTH: Final = 12
_PATIENCE_S: Final = 8.0  # with a storage that does not answer, before a run


class OutputSettings(Protocol):
    """What a run's documents ask of its settings."""

    @property
    def kind(self) -> Kind:
        """What the rows hold."""

    @property
    def output(self) -> str:
        """Where the run is."""

    @property
    def overwrite(self) -> bool:
        """Whether the run that is there is to be deleted."""

    @property
    def retry_failed(self) -> bool:
        """Whether finished shards with failed images are done again."""

    def model_dump(self, *, mode: str) -> dict[str, Any]:
        """All settings, as JSON."""


_Settings_co = TypeVar("_Settings_co", bound=OutputSettings, default=RunConfig, covariant=True)
_Settings = TypeVar("_Settings", bound=OutputSettings)


@dataclass(frozen=True)
class Run(Generic[_Settings_co]):
    """A run that has a manifest and a `run.json`."""

    config: _Settings_co
    fingerprint: str
    determinants: dict[str, Any]
    images: int
    shards: int
    duplicates: int
    skipped: dict[str, int]

    @property
    def run_id(self) -> str:
        """What logs, metrics and Ray's dashboard call the run: the same whoever goes on with it."""
        return self.fingerprint[:_ID_LENGTH]

    @property
    def provenance(self) -> dict[str, Any]:
        """What every shard's footer says of the run."""
        return {"fingerprint": self.fingerprint, "determinants": self.determinants}

    def images_in(self, shard: int) -> int:
        """How many of the images a shard has."""
        size: int = self.determinants["images_per_shard"]
        return min(size, self.images - shard * size)


def check_addresses(config: RunConfig) -> None:
    """Fail early: the output lies elsewhere than the input, can be written, and the input can be listed.

    Within seconds, too: what does not answer is not waited for as long as it is when a run is under way.
    Of a run that is taken up again, the input must still answer, or each image that is left would be a failure.

    Raises:
        OutputConflict: the output lies inside the input.
        StorageError: an address cannot be listed or written.
        NoImages: there is no image under the address, and `allow_empty` is not set.
    """
    if storage.is_inside(config.output, config.images):
        raise OutputConflict(
            f"The output {storage.redact(config.output)} lies inside the input {storage.redact(config.images)}: "
            "its files would be listed as input. Choose an output elsewhere."
        )
    with storage.at_most(_PATIENCE_S):
        probe = f"{config.output}/.everymask-{uuid.uuid4().hex}"
        storage.write_atomic(probe, b"")
        storage.delete(probe)
        resumed = not config.overwrite and storage.exists(f"{config.output}/run.json")
        skipped: Counter[str] = Counter()
        found = storage.list_files(config.images) if resumed else sources.find_images(config.images, skipped)
        if next(found, None) is None and not config.allow_empty:
            raise no_images(config, skipped)


def open_run(config: RunConfig, weights: LoadedWeights, check: Callable[[Run], None] = lambda _: None) -> Run:
    """Begin a run, or take up the one that the output holds.

    Args:
        config: The settings.
        weights: The loaded model's.
        check: Called with the run before anything is written, and before `overwrite` deletes another; what it
            raises prevents both.

    Raises:
        OutputConflict: the output holds another run, or shards of unknown origin; with `overwrite`, only if they
            are of another kind.
        NoImages: there is no image under the address, and `allow_empty` is not set.
        StorageError: an address cannot be listed, read or written.
    """
    determinants = _redacted(config.determinants(weights))
    run = _taken_up(config, determinants)
    if run is None:
        return _begin(config, fingerprint(determinants), determinants, check)
    check(run)
    return run


def open_derived_run(
    config: _Settings, source: str, document: dict[str, Any], determinants: dict[str, Any]
) -> Run[_Settings]:
    """Begin a run whose rows are made from another's, or take up the one that the output holds.

    The other's manifest is copied, so that images keep their numbers and shards their images.

    Args:
        config: The settings.
        source: The other run's output.
        document: What its `run.json` says.
        determinants: All that decides the rows.

    Raises:
        OutputConflict: the output and the other run lie in one another, or the output holds another run, which
            `overwrite` deletes only if it was derived too.
        StorageError: an address cannot be read or written.
    """
    if storage.is_inside(config.output, source) or storage.is_inside(source, config.output):
        raise OutputConflict(
            f"The output {storage.redact(config.output)} and the input {storage.redact(source)} lie in one "
            "another. Choose an output elsewhere."
        )
    there = read_document(config.output) if storage.exists(f"{config.output}/run.json") else None
    if there is not None and "source" not in there["determinants"]:
        raise OutputConflict(
            f"{storage.redact(config.output)} holds a run that was not made from another one's. Choose another "
            "output; --overwrite deletes no such run here."
        )
    determinants = _redacted(determinants)
    if (run := _taken_up(config, determinants)) is not None:
        return run
    if config.overwrite:
        _delete_run(config.output, config.kind)
    counts = document["manifest"]
    manifest.copy_manifest(source, config.output, counts["shards"])
    run = _run_of(config, determinants, counts)
    _write_document(run, counts["digest"])
    return run


def _taken_up(config: _Settings, determinants: dict[str, Any]) -> Run[_Settings] | None:
    """The run that the output holds, if it is the one with these determinants; None where one is to be begun."""
    _refuse_other_kinds(config)
    if config.overwrite or not storage.exists(f"{config.output}/run.json"):
        if not config.overwrite and shards_done(config.output, config.kind):
            raise OutputConflict(
                f"{storage.redact(config.output)} holds shards in {config.kind}/ but no run.json. Choose another "
                "output, or pass --overwrite to delete them."
            )
        return None
    document = read_document(config.output)
    own = fingerprint(determinants)
    if document["fingerprint"] != own:
        raise OutputConflict(_conflict(config.output, document, own, determinants))
    return _run_of(config, determinants, document["manifest"])


def _run_of(config: _Settings, determinants: dict[str, Any], counts: dict[str, Any]) -> Run[_Settings]:
    """What a `run.json` says of its manifest, as a run."""
    return Run(
        config,
        fingerprint(determinants),
        determinants,
        counts["images"],
        counts["shards"],
        counts["duplicates"],
        counts["skipped"],
    )


def read_document(output: str) -> dict[str, Any]:
    """What `run.json` says.

    Raises:
        OutputConflict: the output holds no run, or a damaged `run.json`.
        StorageError: it cannot be read.
    """
    uri = f"{output}/run.json"
    if not storage.exists(uri):
        raise OutputConflict(f"{storage.redact(output)} holds no run: there is no run.json.")
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


def read_finished_masks(output: str) -> dict[str, Any]:
    """What `run.json` says of a run of masks whose shards all have a file.

    Raises:
        OutputConflict: the output holds no such run, or a damaged `run.json`.
        SettingsError: shards are missing.
        StorageError: it cannot be read.
    """
    document = read_document(output)
    if kind_of(document) != "masks":
        raise OutputConflict(f"{storage.redact(output)} holds no run of masks.")
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
    return set(_parts(f"{output}/{kind}"))


def _begin(config: RunConfig, own: str, determinants: dict[str, Any], check: Callable[[Run], None]) -> Run:
    skipped: Counter[str] = Counter()

    def run_of(info: ManifestInfo) -> Run:
        return Run(
            config, own, determinants, info.images, info.shards, info.duplicates, dict(skipped.most_common())
        )

    def before_write(info: ManifestInfo) -> None:
        if info.images == 0 and not config.allow_empty:
            raise no_images(config, skipped)
        check(run_of(info))
        if config.overwrite:
            _delete_run(config.output, config.kind)

    info = manifest.write_manifest(
        sources.find_images(config.images, skipped),
        config.output,
        images_per_shard=config.images_per_shard,
        before_write=before_write,
    )
    run = run_of(info)
    _write_document(run, info.digest)
    return run


def _write_document(run: Run[OutputSettings], digest: str) -> None:
    document = {
        "everymask": pipeline.__version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "fingerprint": run.fingerprint,
        "determinants": run.determinants,
        "manifest": {
            "images": run.images,
            "shards": run.shards,
            "duplicates": run.duplicates,
            "skipped": run.skipped,
            "digest": digest,
        },
        "settings": _redacted(run.config.model_dump(mode="json")),
    }
    storage.write_atomic(f"{run.config.output}/run.json", as_json(document))


def no_images(config: RunConfig, skipped: Counter[str]) -> NoImages:
    """What to raise where a listing has no image."""
    passed = ", ".join(f"{count} {name}" for name, count in skipped.most_common(5)) or "nothing"
    return NoImages(
        f"There is no image under {storage.redact(config.images)} (found {passed}). Check the address, or pass "
        "--allow-empty to write an empty dataset."
    )


def _refuse_other_kinds(config: OutputSettings) -> None:
    """Even `overwrite` deletes only what the command itself makes."""
    for kind in get_args(Kind):
        if kind != config.kind and (_run_kind(config.output) == kind or shards_done(config.output, kind)):
            raise OutputConflict(
                f"{storage.redact(config.output)} holds a run of {kind}, this one makes {config.kind}. Choose "
                "another output; --overwrite deletes no run of another kind."
            )


def _run_kind(output: str) -> Kind | None:
    return kind_of(read_document(output)) if storage.exists(f"{output}/run.json") else None


def _delete_run(output: str, kind: Kind) -> None:
    """`run.json` first: without it the rest is no run."""
    names = ["run.json", "progress.json", "summary.json"]
    for folder in (kind, "manifest"):
        names += [f"{folder}/part-{part:05d}.parquet" for part in _parts(f"{output}/{folder}")]
    for name in names:
        storage.delete(f"{output}/{name}")


def _parts(folder: str) -> Iterator[int]:
    for name in storage.list_names(folder):
        if match := _PART.fullmatch(name):
            yield int(match[1])


def _conflict(output: str, document: dict[str, Any], own: str, determinants: dict[str, Any]) -> str:
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


def _redacted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _redacted(item) for key, item in value.items()}
    return storage.redact(value) if isinstance(value, str) else value


def as_json(document: Any) -> bytes:
    """A document as this project writes them."""
    return (json.dumps(document, indent=2) + "\n").encode()
