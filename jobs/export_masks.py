"""A dataset of masks in the forms that other tools read."""

import logging
from typing import Annotated

from cyclopts import Parameter

from jobs.command import run_command
from pipeline.export.config import ExportConfig
from pipeline.export.export import export
from pipeline.storage import canonical_uri

_NAMED = 10  # of what was left out, in the log
_log = logging.getLogger("everymask")


def export_masks(*, config: Annotated[ExportConfig, Parameter(name="*")]) -> int:
    """Write the masks of a finished run as COCO, SA-1B, YOLO, instance PNGs or COCO panoptic.

    What does not fit into a form is counted and named in export.json, and so are images that failed. The same
    command writes the same files again.

    Exit codes: 0 done; 2 settings, the input is no finished run of masks, or the output holds another export; 3 an
    address; 130 interrupted.
    """
    addresses = {"input": canonical_uri(config.input), "output": canonical_uri(config.output)}
    document = export(config.model_copy(update=addresses))
    _log.info("%d masks of %d images are exported", document["masks"], document["images"])
    for why, count in document["left_out"].items():
        _log.warning("left out: %d x %s", count, why)
    for named in document["named"][:_NAMED]:
        _log.warning("%s", named)
    return 0


if __name__ == "__main__":
    run_command(export_masks, "jobs.export_masks")
