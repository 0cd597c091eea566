"""SA-1B, or what is laid out as it, as a masks dataset of this project."""

import os
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Annotated, Final

from cyclopts import Parameter

from jobs import dataset, preflight
from jobs.command import run_command
from jobs.processes import mapping
from pipeline import run as runs
from pipeline.config import ImportConfig, LoadedWeights
from pipeline.importing import import_shard
from pipeline.progress_file import ProgressFile
from pipeline.reconcile import ToDo
from pipeline.run import Run
from pipeline.shard import ShardSummary

_SAM: LoadedWeights = LoadedWeights(sha256="", image_size=1024, architecture="vit_h", thresholds={})
"""SA-1B's masks are those of the original SAM, whose weights are not known."""

_BATCH: Final = 1000


def import_sa1b(*, config: Annotated[ImportConfig, Parameter(name="*")], processes: int | None = None) -> int:
    """Write the masks of SA-1B as a dataset like that of jobs.generate_masks, which every other command reads.

    Beside each image, or in the same tar, lies a JSON of the same name: sa_1.jpg and sa_1.json. Images are listed
    and not read. An image whose JSON is missing, damaged, or holds a mask of another size is a row that says so.

    Exit codes: 0 done; 1 finished with shards missing, which the same command makes; 2 settings, or the output
    holds another run; 3 an address; 130 interrupted. Finished shards are kept in every case, and the same command
    goes on.

    Args:
        config: Where from, where to.
        processes: Shards made at the same time; by default as many as there are CPUs.
    """
    config = preflight.with_canonical_addresses(config)
    runs.check_addresses(config)
    run = runs.open_run(config, _SAM)
    dataset.finish(run, partial(_make, config=config, processes=processes or os.cpu_count() or 1), nullcontext)
    return 0


def _make(
    run: Run, to_do: ToDo, _told: ProgressFile, *, config: ImportConfig, processes: int
) -> Iterator[ShardSummary]:
    make = partial(import_shard, config=config, provenance=run.provenance)
    at_once = min(processes, len(to_do.shards))
    with mapping(at_once) as map_:
        for shards in to_do.batches(_BATCH):
            yield from map_(make, shards)


if __name__ == "__main__":
    run_command(import_sa1b, "jobs.import_sa1b")
