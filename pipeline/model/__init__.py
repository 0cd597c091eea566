"""MobileSAM and the original SAM, ready to be prompted."""

from typing import Literal

import torch

from pipeline.errors import SelfCheckError, SettingsError
from pipeline.model.fused import decoder_for
from pipeline.model.native import native_decoder
from pipeline.model.sam import PUBLISHED_IMAGE_SIZE, THRESHOLDS, Precision, SamModel
from pipeline.model.tinyvit import STRIDE
from pipeline.model.weights import architecture_of, load_tensors, read_checkpoint

__all__ = ["SamModel", "load_model", "pick_device"]

Device = Literal["auto", "cuda", "mps", "cpu"]


def load_model(
    name_or_checkpoint_uri: str,
    device: Device | torch.device | str = "auto",
    precision: Precision = "fp32",
    image_size: int | None = None,
    *,
    kernels: bool = True,
) -> SamModel:
    """Load a model with its weights, in eval mode.

    Args:
        name_or_checkpoint_uri: `mobile_sam`, `vit_b`, `vit_l` or `vit_h` for the published weights, which
            are downloaded once; `demo` for the small weights that come with this package; or the URI of a .pt,
            .pth or .safetensors file with tensors under the published names. The architecture is told from the
            tensors.
        device: `auto` takes the first of cuda, mps, cpu that is there.
        precision: `fp32`, or `bf16`: bfloat16 where it is worth it. On a GPU that is all but the tokens of
            prompts; on a CPU the encoder of a ViT, and the upscaling where there are no kernels.
        image_size: Side of the encoder's input in pixels, a multiple of 16; by default what the checkpoint
            says it was made for, else 1024.
        kernels: Of a CPU: run the decoder in C++, which is compiled when it is first needed. Of bfloat16 on a GPU:
            try Triton kernels for it, and take them where they are faster.

    Raises:
        CheckpointError: the weights are not to be had, damaged, or of another model.
        SettingsError: no such device, or an image size that the model cannot take.
        StorageError: the checkpoint's address cannot be read.
    """
    target = pick_device(device)
    checkpoint = read_checkpoint(name_or_checkpoint_uri)
    own_size = checkpoint.metadata.get("image_size") or PUBLISHED_IMAGE_SIZE
    size = image_size or own_size
    model = SamModel(architecture_of(checkpoint.tensors), size, precision)
    untouched = {name: value.clone() for name, value in model.state_dict().items()}
    load_tensors(model, checkpoint.tensors, name_or_checkpoint_uri)
    if all(torch.equal(value, untouched[name]) for name, value in model.state_dict().items()):
        raise SelfCheckError(f"Loading {name_or_checkpoint_uri} left the model as it was.")
    model.weights_sha256 = checkpoint.sha256
    model.expected = checkpoint.metadata.get("expected") if size == own_size else None  # answers at that size
    model.thresholds = THRESHOLDS | checkpoint.metadata.get("thresholds", {})
    model.to(target)
    if kernels and target.type == "cuda" and precision == "bf16":
        model.decoder_class = decoder_for(model.fast_decoder, size // STRIDE)
    if kernels and target.type == "cpu":
        model.decoder_class = native_decoder(model.fast_decoder)
    return model


def pick_device(device: Device | torch.device | str) -> torch.device:
    """The device of that name, or the best there is.

    Raises:
        SettingsError: the device is not there.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return torch.device(next(name for name, there in available.items() if there))
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise SettingsError(f"{device!r} is no device; use --device auto or cpu.") from error
    if not available.get(chosen.type, False):
        raise SettingsError(f"There is no {chosen.type} device here; use --device auto or cpu.")
    return chosen
