"""From a training to a checkpoint that anyone can load."""

from typing import cast

import torch

from pipeline.amg.selfcheck import self_checking_checkpoint
from pipeline.model.sam import SamModel
from pipeline.training.loop import Training


def export(training: Training, image_size: int, dtype: torch.dtype = torch.float32) -> bytes:
    """The averaged weights as safetensors under the published names, with their own answers for the self-check.

    The thresholds are the model's: those of the weights that it began from, or of its teacher.

    Args:
        training: Of a whole SAM, a `SamModel`.
        image_size: Side of the input that the weights are for.
        dtype: That they are stored in.
    """
    trained = cast(SamModel, training.model)
    model = SamModel(trained.architecture, image_size, "fp32")
    model.thresholds = trained.thresholds
    model.load_state_dict({name: value.cpu() for name, value in training.average.items()})
    return self_checking_checkpoint(model.eval(), dtype)
