"""Measure a masks dataset: against what is true of its images, or by itself."""

import itertools
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from jobs import tables
from jobs.command import run_command
from pipeline import manifest, storage
from pipeline.errors import SettingsError, TrainingDataError
from pipeline.evaluation import against_truth
from pipeline.evaluation.dataset_report import distribution_tables, truth_table
from pipeline.evaluation.distributions import distributions
from pipeline.evaluation.report import Table
from pipeline.evaluation.truth import open_truth
from pipeline.reading.samples import warn_of_missing
from pipeline.reading.stored import ShardReader, StoredMasks, stored_masks
from schemas.masks import PROCESSED


def evaluate_masks(
    *,
    input: str,  # noqa: A002 (the flag's name)
    truth: str | None = None,
    limit: int | None = None,
    output: str | None = None,
) -> int:
    """Measure the masks of a dataset and print tables, as Markdown.

    With a truth: average recall of up to 10, 100 and 1000 masks an image by the segments' size (COCO's protocol
    without classes), mean best IoU, boundary recall. Without: how scores and sizes are distributed, and how masks
    lie in one another. Images are not read.

    Exit codes: 0 measured; 2 settings, or there is no run; 3 an address, or the dataset or the truth is not what
    it must be, or they have no image in common; 130 interrupted.

    Args:
        input: What the command that made the dataset was given as --output.
        truth: COCO's JSON, a folder or tar of SA-1B, a folder of BSDS500's .mat files, or another masks dataset,
            whose masks are then taken for the truth. Matched by the images' files' paths, datasets by URI.
        limit: Look at so many images of the dataset at most.
        output: Also write the tables there: .md as printed, .json with all digits.
    """
    tables.check_output(output)
    if limit is not None and limit < 1:
        raise SettingsError(f"--limit {limit}: must be 1 or more.")
    stored = stored_masks(input)
    warn_of_missing(stored)
    made = _made_of(stored, limit) if truth is None else _made_against(stored, truth, limit)
    header = {"dataset": f"{storage.redact(stored.output)}, fingerprint {stored.fingerprint[:16]}"}
    if truth is not None:
        header["truth"] = storage.redact(truth)
    tables.put(header | tables.origin("jobs.evaluate_masks"), made, output)
    return 0


def _made_of(stored: StoredMasks, limit: int | None) -> list[Table]:
    processed = (row for row in _rows(stored, limit) if row["status"] in PROCESSED)
    return distribution_tables(distributions(processed))


def _made_against(stored: StoredMasks, address: str, limit: int | None) -> list[Table]:
    uris = (row.ref.uri for shard in stored.shards for row in manifest.read_shard(stored.output, shard))
    truth = open_truth(address, stored, uris)
    matching = against_truth.Matching()
    scores = list(against_truth.measure(_rows(stored, limit), truth, matching))
    if not scores:
        raise TrainingDataError(
            f"{storage.redact(address)} and {storage.redact(stored.output)} have no image in common that could "
            f"be measured: {matching.without_truth} are in the dataset only, {matching.truth_only} in the truth "
            f"only, {matching.other_size} have other sizes."
        )
    return [truth_table(truth.kind, scores, matching)]


def _rows(stored: StoredMasks, limit: int | None) -> Iterator[dict[str, Any]]:
    """With a bar, on a terminal."""
    reader = ShardReader(stored)
    numbers = ((shard, range(stored.images_in(shard))) for shard in stored.shards)
    rows = (row for shard, places in numbers for _, row in reader.rows(shard, places))
    total = sum(stored.images_in(shard) for shard in stored.shards)
    some = itertools.islice(rows, limit)
    yield from tqdm(some, total=min(total, limit or total), unit="image", dynamic_ncols=True, disable=None)


if __name__ == "__main__":
    run_command(evaluate_masks, "jobs.evaluate_masks")
