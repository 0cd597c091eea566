"""Every mask of every image under an address, as Parquet."""

from typing import Annotated

from cyclopts import Parameter

from jobs import preflight
from jobs.command import run_command
from pipeline.config import MasksConfig


def generate_masks(*, config: Annotated[MasksConfig, Parameter(name="*")]) -> int:
    """Find every mask of every image under an address, and write them as Parquet.

    Exit codes: 0 done; 1 finished with shards missing, which the same command makes; 2 settings, or the output
    holds another run; 3 an address, credentials or weights, before anything was started; 4 too many images
    failed; 130 interrupted. Finished shards are kept in every case, and the same command goes on.
    """
    config = preflight.checked(config)
    from jobs import dataset, with_model  # noqa: PLC0415 (with torch and Ray, which take seconds)
    from pipeline.engine import connected, make_shards  # noqa: PLC0415

    if config.dry_run:
        with_model.dry_run(config)
        return 0
    dataset.finish(with_model.begin(config), make_shards, connected)
    return 0


if __name__ == "__main__":
    run_command(generate_masks, "jobs.generate_masks")
