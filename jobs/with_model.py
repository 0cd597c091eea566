"""What the commands share whose rows a model makes: how a run begins, and what it would cost."""

import json
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict

from jobs import preflight
from pipeline import engine, estimate, sources
from pipeline import run as runs
from pipeline.amg.selfcheck import checked_model
from pipeline.config import RunConfig
from pipeline.predict import weights_of
from pipeline.run import Run

_log = logging.getLogger("everymask")


def begin(config: RunConfig, check: Callable[[Run], None] | None = None) -> Run:
    """Begin the run of these settings, or take up the one that the output holds.

    Args:
        config: The settings, as `preflight.checked` gives them.
        check: What it raises of the run prevents it, before anything is written or deleted. With it, all images
            are listed first.

    Raises:
        PreflightError, SettingsError: an address, the weights or the settings; nothing was started.
    """
    engine.check_device(config)
    if preflight.device_comes_first(config):
        runs.check_addresses(config)
    # Loaded once here, so that no worker is started for weights that do not load.
    model = checked_model(config.model.model_copy(update={"device": "cpu"}))
    return runs.open_run(config, weights_of(model), check)


def dry_run(config: RunConfig) -> None:
    """Print what the run of these settings would cost, as JSON; write nothing.

    Args:
        config: The settings, as `preflight.checked` gives them.

    Raises:
        PreflightError, SettingsError: as `begin`.
        IncompleteRun: no sample could be made.
    """
    engine.check_device(config)
    skipped: Counter[str] = Counter()
    drawn = estimate.draw(sources.find_images(config.images, skipped))
    if not drawn.images:
        raise runs.no_images(config, skipped)
    begun = time.monotonic()
    with engine.connected():
        made, workers = engine.measure_sample(config, drawn.sample)
        startup_seconds = time.monotonic() - begun - made.seconds
    if made.failed:
        _log.warning("%d of the %d sampled images failed: %s", made.failed, made.images, made.statuses)
    told = estimate.estimate(drawn, made, startup_seconds, config.images_per_shard, workers)
    print(json.dumps(asdict(told), indent=2))
