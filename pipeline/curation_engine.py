"""Curation on Ray: a task a shard, each on one CPU, from the input's file to the output's.

A shard's file is the truth, as in `pipeline.engine`: a task that is repeated writes the same rows under the same
name, and a shard whose task failed is missed at the end. Masks never travel through Ray's object store.
"""

import itertools
import logging
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Final

from pipeline.engine import connected  # first: what it sets, Ray reads when it is imported

# isort: split
import ray

from pipeline.curation.config import CurationConfig
from pipeline.curation.curate import curate_shard
from pipeline.progress import Progress
from pipeline.progress_file import ProgressFile
from pipeline.reconcile import ToDo
from pipeline.run import Run
from pipeline.shard import ShardSummary

__all__ = ["connected", "curate_shards"]

_RETRIES: Final = 5  # of a task whose worker died
_AHEAD: Final = 64  # tasks handed out beyond the CPUs there are, which is what an autoscaler goes by
_REPORT_SECONDS: Final = 1.0
_CLOSING_SECONDS: Final = 1.0  # `ray job stop` kills the driver after three
_log = logging.getLogger("everymask")


def curate_shards(run: Run[CurationConfig], to_do: ToDo, _told: ProgressFile) -> Iterator[ShardSummary]:
    """Make shards on the connected Ray, and show progress.

    Args:
        run: The run they belong to.
        to_do: Which.

    Yields:
        Each finished shard's summary, as they finish. A shard that failed is named in the log.
    """
    task: Any = ray.remote(num_cpus=1, max_retries=_RETRIES)(_curate)
    config, provenance = ray.put(run.config), ray.put(run.provenance)
    shards = itertools.chain.from_iterable(to_do.batches(_AHEAD))
    working: dict[Any, int] = {}
    progress = Progress(run.plan, to_do.images_before, with_masks=True)
    images = masks = failed = 0
    try:
        while True:
            for shard in itertools.islice(shards, _at_once(run.config) - len(working)):
                working[task.remote(shard, config, provenance)] = shard
            if not working:
                return
            for result in ray.wait(list(working), timeout=_REPORT_SECONDS)[0]:
                summary = _result(result, working.pop(result))
                if summary is not None:
                    images, masks, failed = images + summary.images, masks + summary.masks, failed + summary.failed
                    yield summary
            progress.show(images, masks, failed)
    finally:
        progress.close()
        _end(list(working))


def _curate(shard: int, config: CurationConfig, provenance: dict[str, Any]) -> str:
    return curate_shard(shard, config, provenance).to_json()


def _at_once(config: CurationConfig) -> int:
    if config.num_workers is not None:
        return config.num_workers
    cpus = ray.cluster_resources().get("CPU", 1.0)  # type: ignore[no-untyped-call]
    return int(cpus) + _AHEAD


def _result(result: Any, shard: int) -> ShardSummary | None:
    try:
        return ShardSummary.from_json(ray.get(result))
    except ray.exceptions.RayError as error:
        _log.error("shard %d is not made: %s", shard, (str(error).strip() or repr(error)).splitlines()[-1])
        return None


def _end(working: list[Any]) -> None:
    """Bring writing to its end where a run is left, so that what is there now is what will be there."""
    deadline = time.monotonic() + _CLOSING_SECONDS
    with suppress(ray.exceptions.RayError):
        for result in working:
            ray.cancel(result)
        while working and time.monotonic() < deadline:
            _, working = ray.wait(working, num_returns=len(working), timeout=_CLOSING_SECONDS)
