"""Write an untrained MobileSAM checkpoint: the same weights for the same seed."""

import logging

from jobs.command import run_command
from pipeline import storage
from pipeline.amg.selfcheck import self_checking_checkpoint
from pipeline.model.weights import seeded_model

_log = logging.getLogger("everymask")


def seeded_checkpoint(*, output: str, seed: int = 0, image_size: int = 1024) -> int:
    """Write an untrained MobileSAM checkpoint, for trying things out: its masks mean nothing.

    Args:
        output: Address of the .safetensors file.
        seed: The same seed gives the same weights.
        image_size: Side of the encoder's input that the file asks for, in pixels.
    """
    model = seeded_model(seed, image_size)
    storage.write_atomic(output, self_checking_checkpoint(model))
    _log.info("wrote %s, untrained weights of seed %d", output, seed)
    return 0


if __name__ == "__main__":
    run_command(seeded_checkpoint, "jobs.seeded_checkpoint")
