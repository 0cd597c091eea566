"""What is looked at before a run: the addresses, before anything is imported that takes seconds to import."""

from typing import TypeVar

from pipeline import run as runs
from pipeline.cluster import check_answers, cluster_address
from pipeline.config import RunConfig
from pipeline.storage import canonical_uri

_Config = TypeVar("_Config", bound=RunConfig)


def checked(config: _Config) -> _Config:
    """The settings with addresses that mean the same in workers, which run in other folders.

    Cluster, input, output and checkpoint must answer, within seconds. Not looked at is a dry run, which writes
    nothing, and one whose `device_comes_first`.

    Raises:
        ClusterError: the cluster does not answer.
        OutputConflict, StorageError, NoImages: as `pipeline.run.check_addresses`.
    """
    model = config.model
    if model.checkpoint is not None:
        model = model.model_copy(update={"checkpoint": canonical_uri(model.checkpoint)})
    config = config.model_copy(
        update={"images": canonical_uri(config.images), "output": canonical_uri(config.output), "model": model}
    )
    if not config.dry_run and not device_comes_first(config):
        check_answers()
        runs.check_addresses(config)
    return config


def device_comes_first(config: RunConfig) -> bool:
    """Whether this machine must have a device that only torch finds: without it, nothing is read."""
    return config.asks_for_device and cluster_address() is None
