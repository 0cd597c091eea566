"""What is looked at before a run: the addresses, before anything is imported that takes seconds to import."""

from typing import TypeVar

from pipeline import run as runs
from pipeline.cluster import check_answers, cluster_address
from pipeline.config import RunConfig
from pipeline.storage import canonical_uri

_Config = TypeVar("_Config", bound=RunConfig)


def checked(config: _Config) -> _Config:
    """The settings of a run on Ray with canonical addresses, once cluster, input, output and checkpoint answer.

    They must within seconds. Not looked at is a dry run, which writes nothing, and one whose `device_comes_first`.

    Raises:
        ClusterError: the cluster does not answer.
        OutputConflict, StorageError, NoImages: as `pipeline.run.check_addresses`.
    """
    config = with_canonical_addresses(config)
    if not config.dry_run and not device_comes_first(config):
        check_answers()
        runs.check_addresses(config)
    return config


def with_canonical_addresses(config: _Config) -> _Config:
    """Paths must mean the same in workers, which run in other folders."""
    model = config.model
    if model.checkpoint is not None:
        model = model.model_copy(update={"checkpoint": canonical_uri(model.checkpoint)})
    return config.model_copy(
        update={"images": canonical_uri(config.images), "output": canonical_uri(config.output), "model": model}
    )


def device_comes_first(config: RunConfig) -> bool:
    """Whether this machine must have a device that only torch finds: without it, nothing is read."""
    return config.asks_for_device and cluster_address() is None
