"""`summary.json`: what became of a run, reconciled with its manifest."""

from typing import Final, Literal, TypedDict

SCHEMA_VERSION: Final = 4

State = Literal["complete", "incomplete", "interrupted", "too_many_failures"]


class Summary(TypedDict):
    """`images` = `ok` + `empty` + `failed` + `not_done`, and `not_done` is 0 in a complete run."""

    schema_version: int
    state: State
    fingerprint: str
    images: int
    """Images in the manifest."""
    listed: bool
    """Whether these are all that are under the address; not where the run ended while it was listed. Since version
    4."""
    ok: int
    """With at least one mask, or with an embedding."""
    empty: int
    """Processed, and no mask passed the thresholds. 0 in a run of embeddings."""
    failed: int
    """With any other status."""
    not_done: int
    """Of shards that have no file, or a damaged one."""
    failures: dict[str, int]
    """Failed images by status."""
    masks: int
    """0 in a run of embeddings."""
    funnel: dict[str, int] | None
    """Masks by what became of them, `pipeline.amg.funnel.Funnel`; `masks` = `confident` - `unstable` - `cut` -
    `duplicates`. None where a shard was made before it was counted; empty in a run of embeddings. Since version
    3."""
    bytes: int
    """Of all shards."""
    shards: int
    missing_shards: list[int]
    """Those without a file, at most the first 1,000."""
    damaged_shards: list[int]
    """Those whose file cannot be read, at most the first 1,000."""
    skipped: dict[str, int]
    """Files under the address that were not taken as images, by suffix or name."""
    duplicates: int
    """Listed more than once and taken once."""
    worker_seconds: float
    """Summed over shards, whichever run made them."""
    seconds: float
    """Of this run, from the first shard's dispatch."""
    images_per_second: float
    """Of this run: the images it finished, over `seconds`."""
