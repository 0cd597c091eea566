"""A run begun, or taken up: its manifest and its `run.json`. `pipeline.reconcile` has its end.

There is no other state. What is done is the shards that have a file; the manifest is written once; `run.json`
comes after the manifest, so where it stands the manifest is whole. Where a listing is in order, shards are made
while it goes on: until `run.json` is there, `plan.json` says how much of the manifest is final.
"""

import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Generic, Protocol, get_args

from typing_extensions import TypeVar  # with a default, as of Python 3.13

import pipeline
from pipeline import manifest, sources, storage
from pipeline.config import Kind, LoadedWeights, RunConfig, fingerprint
from pipeline.documents import (
    PLAN,
    RUN,
    as_json,
    conflict,
    document_there,
    kind_of,
    parts,
    read,
    redacted,
    shards_done,
)
from pipeline.errors import NoImages, OutputConflict, StorageError
from pipeline.manifest import SHARDS_PER_PART, EarlyParts, ManifestInfo
from pipeline.plan import Counts, Plan

_ID_LENGTH: Final = 12
_WAIT_S: Final = 1.0
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
    """A run that has a manifest and a `run.json`, or will have them when its `plan` has ended."""

    config: _Settings_co
    fingerprint: str
    determinants: dict[str, Any]
    plan: Plan

    @property
    def run_id(self) -> str:
        """What logs, metrics and Ray's dashboard call the run: the same whoever goes on with it."""
        return self.fingerprint[:_ID_LENGTH]

    @property
    def provenance(self) -> dict[str, Any]:
        """What every shard's footer says of the run."""
        return {"fingerprint": self.fingerprint, "determinants": self.determinants}

    @property
    def images(self) -> int:
        """Images in the manifest, as far as it is written."""
        return self.plan.counts.images

    @property
    def shards(self) -> int:
        """Shards in the manifest, as far as it is written."""
        return self.plan.counts.shards

    def images_in(self, shard: int) -> int:
        """How many of the images a shard has."""
        size: int = self.determinants["images_per_shard"]
        return min(size, self.images - shard * size)


def check_addresses(config: RunConfig) -> None:
    """Fail early: the output lies elsewhere than the input and can be written; input and checkpoint are there.

    Within seconds, too: what does not answer is not waited for as long as it is when a run is under way.
    Of a run that is taken up again, the input must still answer, or each image that is left would be a failure.

    Raises:
        OutputConflict: the output lies inside the input.
        StorageError: an address cannot be listed or written, or holds no checkpoint.
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
        resumed = not config.overwrite and storage.exists(f"{config.output}/{RUN}")
        skipped: Counter[str] = Counter()
        found = storage.list_files(config.images) if resumed else sources.find_images(config.images, skipped)
        if next(found, None) is None and not config.allow_empty:
            raise no_images(config, skipped)
        checkpoint = config.model.checkpoint
        if checkpoint is not None and not storage.exists(checkpoint):
            raise StorageError(f"There is no checkpoint at {storage.redact(checkpoint)}: check the address.")


def open_run(config: RunConfig, weights: LoadedWeights, check: Callable[[Run], None] | None = None) -> Run:
    """Begin a run, or take up the one that the output holds.

    Of a large listing that is in order the run has its first shards when they are numbered, and lists on in a
    thread, until its `plan` has ended or is stopped. With `check` or `overwrite` everything is listed first.

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
    determinants = redacted(config.determinants(weights))
    run = _taken_up(config, determinants)
    if run is None:
        if check is not None or config.overwrite or not storage.lists_in_order(config.images):
            return _begin(config, determinants, check)
        run = Run(config, fingerprint(determinants), determinants, Plan(Counts(), ended=False))
    if check is not None:
        check(run)
    if not run.plan.ended:
        _list_in_background(run)
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
    name = document_there(config.output)
    there = None if name is None else read(config.output, name)
    if there is not None and "source" not in there["determinants"]:
        raise OutputConflict(
            f"{storage.redact(config.output)} holds a run that was not made from another one's. Choose another "
            "output; --overwrite deletes no such run here."
        )
    determinants = redacted(determinants)
    if (run := _taken_up(config, determinants)) is not None:
        return run
    if config.overwrite:
        _delete_run(config.output, config.kind)
    counts = _counts_of(document)
    manifest.copy_manifest(source, config.output, counts.shards)
    run = Run(config, fingerprint(determinants), determinants, Plan(counts))
    _write_document(run, document["manifest"]["digest"])
    return run


def _taken_up(config: _Settings, determinants: dict[str, Any]) -> Run[_Settings] | None:
    """The run that the output holds, if it is the one with these determinants; None where one is to be begun."""
    _refuse_other_kinds(config)
    if config.overwrite:
        return None
    name = document_there(config.output)
    if name is None:
        if shards_done(config.output, config.kind):
            raise OutputConflict(
                f"{storage.redact(config.output)} holds shards in {config.kind}/ but no run.json. Choose another "
                "output, or pass --overwrite to delete them."
            )
        return None
    document = read(config.output, name)
    own = fingerprint(determinants)
    if document["fingerprint"] != own:
        raise OutputConflict(conflict(config.output, document, own, determinants))
    return Run(config, own, determinants, Plan(_counts_of(document), ended=name == RUN))


def _counts_of(document: dict[str, Any]) -> Counts:
    counts = document["manifest"]
    return Counts(counts["images"], counts["shards"], counts["duplicates"], counts["skipped"])


def _begin(config: RunConfig, determinants: dict[str, Any], check: Callable[[Run], None] | None) -> Run:
    """List all images, and then write the manifest."""
    skipped: Counter[str] = Counter()

    def run_of(info: ManifestInfo) -> Run:
        return Run(config, fingerprint(determinants), determinants, Plan(_counts(info, skipped)))

    def before_write(info: ManifestInfo) -> None:
        if info.images == 0 and not config.allow_empty:
            raise no_images(config, skipped)
        if check is not None:
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


def _list_in_background(run: Run) -> None:
    """Write the manifest while it is listed, and wait until there is a shard, or none.

    Raises:
        NoImages, StorageError: as `open_run`, of what is found before the first shard.
    """
    config, there = run.config, run.shards // SHARDS_PER_PART
    skipped: Counter[str] = Counter()

    def before_write(info: ManifestInfo) -> None:
        if info.images == 0 and not config.allow_empty:
            raise no_images(config, skipped)

    def put(parts: int) -> None:
        shards = parts * SHARDS_PER_PART
        counts = Counts(shards * config.images_per_shard, shards, 0, dict(skipped.most_common()))
        _write_document(run, None, counts)
        run.plan.grow(counts)

    def list_all(plan: Plan) -> None:
        info = manifest.write_manifest(
            plan.until_stopped(sources.find_images(config.images, skipped)),
            config.output,
            images_per_shard=config.images_per_shard,
            before_write=before_write,
            early=EarlyParts(put, there),
        )
        counts = _counts(info, skipped)
        _write_document(run, info.digest, counts)
        storage.delete(f"{config.output}/{PLAN}")
        plan.grow(counts, ended=True)

    run.plan.begin(list_all)
    try:
        while not run.plan.wait(0, _WAIT_S):
            pass
    except BaseException:
        run.plan.stop()
        raise


def _counts(info: ManifestInfo, skipped: Counter[str]) -> Counts:
    return Counts(info.images, info.shards, info.duplicates, dict(skipped.most_common()))


def _write_document(run: Run[OutputSettings], digest: str | None, counts: Counts | None = None) -> None:
    """`run.json`, or `plan.json` as long as the manifest has no digest."""
    counts = counts or run.plan.counts
    document = {
        "everymask": pipeline.__version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "fingerprint": run.fingerprint,
        "determinants": run.determinants,
        "manifest": {
            "images": counts.images,
            "shards": counts.shards,
            "duplicates": counts.duplicates,
            "skipped": counts.skipped,
            "digest": digest,
        },
        "settings": redacted(run.config.model_dump(mode="json")),
    }
    name = PLAN if digest is None else RUN
    storage.write_atomic(f"{run.config.output}/{name}", as_json(document))


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
    name = document_there(output)
    return None if name is None else kind_of(read(output, name))


def _delete_run(output: str, kind: Kind) -> None:
    """`run.json` first: without it the rest is no run."""
    names = [RUN, PLAN, "progress.json", "summary.json"]
    for folder in (kind, "manifest"):
        names += [f"{folder}/part-{part:05d}.parquet" for part in parts(f"{output}/{folder}")]
    for name in names:
        storage.delete(f"{output}/{name}")
