"""Write a report of a masks dataset: one HTML file to look at."""

import json
import logging
import os
from functools import partial, reduce
from typing import Annotated, Final

from cyclopts import Parameter
from cyclopts.validators import Number

from jobs.command import run_command
from jobs.processes import mapping
from pipeline import documents, storage
from pipeline.report.page import Report, html_of
from pipeline.report.pictures import shown_images
from pipeline.report.tally import Sampling, Tally, tally_shard

_SHARDS_A_PROCESS: Final = 16  # a process takes seconds to start
_log = logging.getLogger("everymask")
_Count = Annotated[int, Parameter(validator=Number(gte=0, lte=1000))]


def report(
    *,
    input: str,  # noqa: A002 (a flag)
    output: str,
    sample: _Count = 48,
    outliers: _Count = 8,
    seed: int = 0,
    processes: int | None = None,
) -> int:
    """Write a report of a masks dataset: one HTML file that opens from disk and needs no network.

    It shows what became of the images, how masks and their scores are distributed, and a sample of the pictures
    with their masks drawn over them. The whole dataset is read, a row group at a time. The size of the report does
    not grow with it, but with the pictures shown: about 0.1 MB each, 0.4 MB at most.

    Images that are gone or changed are named, and their masks drawn without them. Exit codes: 0 done; 2 settings,
    or there is no run of masks that this version reads; 3 an address cannot be read or written.

    Args:
        input: What jobs.generate_masks, jobs.curate_masks or jobs.import_sa1b was given as --output.
        output: Folder or prefix that receives index.html.
        sample: Images to show, drawn from all that were processed.
        outliers: Images to show of each kind: with the most masks, with none, least stable.
        seed: The same seed draws the same images.
        processes: Shards read at the same time; by default as many as there are CPUs, fewer for few shards.
    """
    dataset = storage.canonical_uri(input)
    document = documents.read_masks(dataset)
    sampling = Sampling(seed, sample, outliers)
    shards = sorted(documents.shards_done(dataset, "masks") & set(range(document["manifest"]["shards"])))
    count = partial(tally_shard, dataset, document["fingerprint"], sampling)
    with mapping(processes or min(os.cpu_count() or 1, len(shards) // _SHARDS_A_PROCESS)) as map_:
        tally = reduce(lambda one, two: one.plus(two, sampling), map_(count, shards), Tally())
    chosen = {
        image.image_id for group in (tally.sample, tally.most, tally.empty, tally.unstable) for image in group
    }
    shown = list(shown_images(dataset, document, chosen))
    summary_uri = f"{dataset}/summary.json"
    summary = json.loads(storage.read_bytes(summary_uri)) if storage.exists(summary_uri) else None
    page = html_of(
        Report(output=dataset, document=document, summary=summary, tally=tally, sampling=sampling, shown=shown)
    ).encode()
    address = f"{storage.canonical_uri(output)}/index.html"
    storage.write_atomic(address, page)
    for image in shown:
        if image.missing:
            _log.warning("not shown: %s", image.missing)
    for fault in tally.faults:
        _log.warning("left out: %s", fault)
    _log.info(
        "%d masks of %d images; wrote %s, %.1f MB",
        tally.masks,
        tally.images,
        storage.redact(address),
        len(page) / 1e6,
    )
    return 0


if __name__ == "__main__":
    run_command(report, "jobs.report")
