"""How a run is, read from its output alone: what its documents say, and what of it looks stuck."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

from pipeline import storage
from pipeline.documents import kind_of, read_document, shards_done
from pipeline.errors import SettingsError
from schemas import progress as progress_schema
from schemas import summary as summary_schema
from schemas.progress import Progress, ShardInWork

_SILENT_S: Final = 60.0  # of a driver that writes every 10 s, of a worker that reports every second
_WAITING_S: Final = 120.0  # without a worker: loading a model takes some
_SLOW_S: Final = 30.0  # at least, and
_SLOW_TIMES: Final = 10.0  # the average
_AGAIN: Final = 3  # attempts, from which on a shard is looked at
_LISTED: Final = 5  # of a kind
_PROGRESS: Final = TypeAdapter(Progress)
_SUMMARY_KEYS: Final = ("state", "images", "not_done", "failed")


@dataclass(frozen=True)
class Status:
    """What an output says of its run at one time."""

    output: str
    """Without credentials."""
    document: dict[str, Any]
    """`run.json`."""
    progress: Progress | None
    """`progress.json`; None where there is none, or one of another run."""
    summary: dict[str, Any] | None
    """`summary.json`, if there is one. While a run is taken up again, it is that of the time before."""
    shards_done: int
    """Shards that have a file, as listed now."""
    read: datetime
    """UTC."""

    @property
    def run_id(self) -> str:
        """The first 12 digits of the fingerprint."""
        fingerprint: str = self.document["fingerprint"]
        return fingerprint[:12]

    @property
    def kind(self) -> str:
        """What the rows hold."""
        return kind_of(self.document)

    @property
    def shards(self) -> int:
        """Shards of the manifest."""
        shards: int = self.document["manifest"]["shards"]
        return shards

    @property
    def silent_seconds(self) -> float | None:
        """Since the driver wrote progress.json; None without one."""
        if self.progress is None:
            return None
        return max((self.read - datetime.fromisoformat(self.progress["updated"])).total_seconds(), 0.0)

    @property
    def state(self) -> str | None:
        """As `schemas.progress.State`; None where nothing says.

        A driver that ended its run and could not say so in progress.json has written summary.json.
        """
        ended = None if self.summary is None else str(self.summary["state"])
        if self.progress is None:
            return ended
        silent = (self.silent_seconds or 0.0) > _SILENT_S
        if self.progress["state"] == "running" and silent and ended == "complete":
            return ended if self.shards_done == self.shards else "running"
        return self.progress["state"]


def read_status(output: str) -> Status:
    """Read what an output says of its run; a few small files and the listing of its shards.

    Args:
        output: Its canonical address.

    Raises:
        OutputConflict: it holds no run, or a damaged `run.json`.
        SettingsError: `progress.json` or `summary.json` is damaged, or newer than this version reads.
        StorageError: it cannot be read.
    """
    document = read_document(output, unlisted=True)
    progress = _read(f"{output}/progress.json", progress_schema.SCHEMA_VERSION, ("fingerprint",))
    if progress is not None and progress["fingerprint"] != document["fingerprint"]:
        progress = None
    summary = _read(f"{output}/summary.json", summary_schema.SCHEMA_VERSION, _SUMMARY_KEYS)
    shards = document["manifest"]["shards"]
    return Status(
        output=storage.redact(output),
        document=document,
        progress=None if progress is None else _checked(progress, f"{output}/progress.json"),
        summary=summary,
        shards_done=len(shards_done(output, kind_of(document)) & set(range(shards))),
        read=datetime.now(UTC),
    )


def findings(status: Status) -> list[str]:
    """What looks stuck or went wrong, and what to do about it, a text each; none of a run that goes well."""
    if status.progress is None:
        return [
            "There is no progress.json of this run: it was made before there was one, or the file was deleted."
        ]
    found = list(_of_shards(status.progress))
    if status.state != "running":
        return found
    silent = status.silent_seconds or 0.0
    if silent > _SILENT_S:
        return [
            f"The driver has not written for {silent:.0f} s: it may be dead. The same command goes on.",
            *found,
        ]
    return [*_of_workers(status.progress), *found]


def _read(uri: str, version: int, keys: tuple[str, ...]) -> dict[str, Any] | None:
    """A document with these keys; None where there is none."""
    if not storage.exists(uri):
        return None
    try:
        document: dict[str, Any] = json.loads(storage.read_bytes(uri))
        theirs = int(document["schema_version"])
    except (ValueError, LookupError, TypeError) as error:
        raise _damaged(uri, error) from error
    if theirs > version:
        raise SettingsError(
            f"{storage.redact(uri)} has version {theirs} of its schema; this everymask reads up to version "
            f"{version}. Install a newer one."
        )
    if missing := [key for key in keys if key not in document]:
        raise _damaged(uri, KeyError(*missing))
    return document


def _checked(document: dict[str, Any], uri: str) -> Progress:
    try:
        progress = _PROGRESS.validate_python(document)
        _ = datetime.fromisoformat(progress["updated"]) - datetime.fromisoformat(progress["started"])
        _ = datetime.now(UTC) - datetime.fromisoformat(progress["updated"])
    except (ValidationError, ValueError, TypeError) as error:
        raise _damaged(uri, error) from error
    return progress


def _damaged(uri: str, error: Exception) -> SettingsError:
    cause = str(error).partition("\n")[0]
    return SettingsError(
        f"{storage.redact(uri)} is damaged ({type(error).__name__}: {cause}). A command that is running writes it "
        "anew within ten seconds; otherwise delete it."
    )


def _of_workers(progress: Progress) -> Iterator[str]:
    """What the workers of a run that is going on do not do."""
    if progress["workers"] is not None and not progress["in_work"] and progress["seconds"] > _WAITING_S:
        yield (
            "No worker makes a shard: the cluster waits for a machine, or workers do not start. `ray status` and "
            "the driver's log say more."
        )
    usual = progress["seconds_per_image"] or 0.0
    slow = [one for one in progress["in_work"] if _seconds_at_hand(one) >= max(_SLOW_S, _SLOW_TIMES * usual)]
    for one in slow[:_LISTED]:
        if (image := one["image"]) is not None:
            yield (
                f"Image {image['image_id']} of shard {one['shard']} has been at hand for {image['seconds']:.0f} "
                f"s; others take {usual:.3g} s: {image['uri']}"
            )
    for one in [one for one in progress["in_work"] if one["silent_seconds"] > _SILENT_S][:_LISTED]:
        yield (
            f"The worker of shard {one['shard']} has not been heard of for {one['silent_seconds']:.0f} s. If it "
            "is dead, another makes the shard."
        )


def _of_shards(progress: Progress) -> Iterator[str]:
    for one in [one for one in progress["in_work"] if one["attempt"] >= _AGAIN][:_LISTED]:
        image = one["died_at"]
        where = f" The last died at image {image['image_id']} or soon after: {image['uri']}" if image else ""
        yield f"Shard {one['shard']} is in its attempt {one['attempt']}, as its workers died.{where}"
    for failed in progress["failed_shards"][:_LISTED]:
        yield f"Shard {failed['shard']} failed: {failed['error']} The same command makes it again."
    if (more := progress["shards_failed"] - _LISTED) > 0:
        yield f"{more} more shards failed."
    if progress["workers_died"]:
        yield (
            f"Workers died while they made a shard, {progress['workers_died']} in all; others made it again. "
            "Where machines are taken back, that is usual; else the dashboard's list of actors says why."
        )


def _seconds_at_hand(one: ShardInWork) -> float:
    return one["image"]["seconds"] if one["image"] is not None else 0.0
