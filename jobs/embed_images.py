"""The teacher store of decoupled distillation: the embedding of every image under an address, as Parquet."""

import logging
from typing import Annotated, Final

from cyclopts import Parameter

from jobs import preflight
from jobs.command import run_command
from pipeline.config import EmbeddingsConfig
from pipeline.errors import SettingsError
from pipeline.run import Run
from schemas.embeddings import embedding_bytes

_MIB: Final = 2**20
_GIB: Final = 2**30
_log = logging.getLogger("everymask")


def embed_images(*, config: Annotated[EmbeddingsConfig, Parameter(name="*")]) -> int:
    """Run the image encoder on every image under an address, and keep its embeddings as Parquet, in float16.

    A student learns from them without the encoder (MobileSAM's decoupled distillation,
    https://arxiv.org/abs/2306.14289). Exit codes: 0 done; 1 finished with shards missing, which the same command
    makes; 2 settings, or the output holds another run, or the store would be larger than --max-bytes; 3 an
    address, credentials or weights, before anything was started; 4 too many images failed; 130 interrupted.
    Finished shards are kept in every case, and the same command goes on.
    """
    config = preflight.checked(config)
    from jobs import dataset, with_model  # noqa: PLC0415 (with torch and Ray, which take seconds)
    from pipeline.engine import connected, make_shards  # noqa: PLC0415

    if config.dry_run:
        with_model.dry_run(config)
        return 0
    run = with_model.begin(config, lambda run: _check_size(run, config.max_bytes))
    dataset.finish(run, make_shards, connected)
    return 0


def _check_size(run: Run, max_bytes: int) -> None:
    """Say what the store will take, and refuse it where that is too much."""
    each = embedding_bytes(run.determinants["image_size"])
    needed = run.images * each
    cost = f"{run.images} images x {each / _MIB:.4g} MiB = {needed / _GIB:.4g} GiB of embeddings"
    if needed > max_bytes:
        raise SettingsError(
            f"{cost} ({needed} bytes), and --max-bytes allows {max_bytes / _GIB:.4g} GiB ({max_bytes} bytes). "
            "Nothing was embedded; a higher --max-bytes allows it."
        )
    _log.info("%s, before compression", cost)


if __name__ == "__main__":
    run_command(embed_images, "jobs.embed_images")
