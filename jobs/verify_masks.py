"""Check a dataset of masks or of embeddings against its manifest and against itself."""

import logging
import os
from functools import partial
from typing import Final

from jobs.command import run_command
from jobs.processes import mapping
from pipeline import storage
from pipeline.documents import kind_of, read_document
from pipeline.shard import shard_uri
from pipeline.verify import fault_of_manifest, faults_of_shard, strays

_SHARDS_A_PROCESS: Final = 16  # a process takes a second to start
_SHOWN_A_SHARD: Final = 10
_log = logging.getLogger("everymask")


def verify_masks(*, output: str, processes: int | None = None, remove_damaged: bool = False) -> int:
    """Check that every shard is there and sound, has each image once, and that every RLE fits its mask.

    Also that the manifest is the run's, and that no other file stands between the shards.
    Of a store that jobs.embed_images made, check the embeddings: undamaged, finite, of the right shape.

    What is wrong is named on standard output, a line each. Exit codes: 0 all is well; 1 something is wrong;
    2 there is no run; 3 the address cannot be read.

    Args:
        output: What jobs.generate_masks or jobs.embed_images was given as --output.
        processes: Shards checked at the same time; by default as many as there are CPUs, fewer for few shards.
        remove_damaged: Delete the shards that are wrong, so that the command that made them makes them again, and
            the files that are no shards of this run.
    """
    output = storage.canonical_uri(output)
    document = read_document(output)
    shards = document["manifest"]["shards"]
    kind = kind_of(document)
    check = partial(faults_of_shard, output, kind, document["fingerprint"])
    manifest_fault = fault_of_manifest(output, shards, document["manifest"]["digest"])
    if manifest_fault is not None:
        print(manifest_fault)
    others = strays(output, kind, shards)
    for name in others:
        print(f"{name}: no shard of this run, which has {shards}")
        if remove_damaged:
            storage.delete(f"{output}/{name}")
    faulty = 0
    with mapping(processes or min(os.cpu_count() or 1, shards // _SHARDS_A_PROCESS)) as map_:
        for shard, faults in enumerate(map_(check, range(shards))):
            faulty += bool(faults)
            for fault in faults[:_SHOWN_A_SHARD]:
                print(fault)
            if len(faults) > _SHOWN_A_SHARD:
                print(f"... and {len(faults) - _SHOWN_A_SHARD} more in this shard")
            if faults and remove_damaged:
                storage.delete(shard_uri(output, kind, shard))
    images = document["manifest"]["images"]
    _log.info("%d images in %d shards: %d shards are not sound", images, shards, faulty)
    return 1 if faulty or others or manifest_fault else 0


if __name__ == "__main__":
    run_command(verify_masks, "jobs.verify_masks")
