"""From every mask that was found to those that a training is to see, as another dataset."""

from typing import Annotated

from cyclopts import Parameter

from jobs import dataset
from jobs.command import run_command
from pipeline import documents
from pipeline import run as runs
from pipeline.curation.config import CurationConfig
from pipeline.storage import canonical_uri


def curate_masks(*, config: Annotated[CurationConfig, Parameter(name="*")]) -> int:
    """Filter the masks of a finished run, drop duplicates, find what lies in what, make a partition.

    The output is a run of its own, which every command reads that reads the input. No step is taken unless a
    flag asks for it; they come in the order of their flags. docs/curation.md has their rules.

    Exit codes: 0 done; 1 finished with shards missing, which the same command makes; 2 settings, the input is no
    finished run of masks, or the output holds another; 3 an address; 130 interrupted. Finished shards are kept in
    every case, and the same command goes on.
    """
    addresses = {"input": canonical_uri(config.input), "output": canonical_uri(config.output)}
    config = config.model_copy(update=addresses)
    source = documents.read_finished_masks(config.input)
    run = runs.open_derived_run(config, config.input, source, config.determinants(source))
    from pipeline.curation_engine import curate_shards  # noqa: PLC0415 (with Ray, which takes seconds)
    from pipeline.engine import connected  # noqa: PLC0415

    dataset.finish(run, curate_shards, connected)
    return 0


if __name__ == "__main__":
    run_command(curate_masks, "jobs.curate_masks")
