"""Decoupled distillation, MobileSAM's: a small image encoder learns a large one's embeddings, and nothing else.

Paper: https://arxiv.org/abs/2306.14289, section 3. Prompt encoder and mask decoder stay the teacher's and take no
part, so neither prompts nor masks are needed: mean squared error between embeddings.
"""

from dataclasses import dataclass
from typing import Final

import huggingface_hub
import safetensors.torch
import torch
from huggingface_hub.errors import HfHubHTTPError
from torch import nn
from torch.nn import functional as F

from pipeline import storage
from pipeline.errors import CheckpointError
from pipeline.model.sam import THRESHOLDS, Architecture, SamModel
from pipeline.model.tinyvit import STRIDE, TinyVitEncoder
from pipeline.model.weights import Tensors, load_tensors, published_tensors, read_checkpoint, seeded_model
from pipeline.training.config import Student
from pipeline.training.coupled import normalised
from pipeline.training.loop import Losses

STUDENTS: Final[dict[Student, Architecture]] = {
    "tiny_vit_5m": "mobile_sam",
    "tiny_vit_11m": "tiny_vit_11m",
    "tiny_vit_21m": "tiny_vit_21m",
}
"""What a SAM with this image encoder is called."""


@dataclass(frozen=True)
class Lessons:
    """A batch: B pictures as the encoder sees them, and what the teacher makes of them."""

    names: tuple[str, ...]
    pixels_B3SS: torch.Tensor
    """uint8, RGB; of any value right of and below `input_sizes_B2`."""
    input_sizes_B2: torch.Tensor
    """int64, height and width in pixels that are the picture and no padding."""
    targets_BCGG: torch.Tensor
    """float16, B x 256 x S/16 x S/16."""

    def to(self, device: torch.device) -> "Lessons":
        """The same on another device."""
        tensors = (self.pixels_B3SS, self.input_sizes_B2, self.targets_BCGG)
        return Lessons(self.names, *(tensor.to(device, non_blocking=True) for tensor in tensors))

    @property
    def inputs_B3SS(self) -> torch.Tensor:
        """What `SamModel.preprocess` makes of the pictures: normalised, zero where padded."""
        inside_BSS = _inside(self.input_sizes_B2, self.pixels_B3SS.shape[-1])
        return torch.where(inside_BSS[:, None], normalised(self.pixels_B3SS), 0.0)

    @property
    def covered_BGG(self) -> torch.Tensor:
        """Whether a place of the embedding has any of the picture in it, and not only padding."""
        cells_B2 = torch.div(self.input_sizes_B2 + STRIDE - 1, STRIDE, rounding_mode="floor")
        return _inside(cells_B2, self.targets_BCGG.shape[-1])


class Distillation(nn.Module):
    """The objective: a batch in, `loss` out."""

    def __init__(self, model: SamModel, *, with_padding: bool = False) -> None:
        """Take the model whose image encoder is the student.

        Args:
            model: Its encoder is changed; the rest is held still.
            with_padding: Let the places count that hold padding only.
        """
        super().__init__()
        self.model = model
        model.prompt_encoder.requires_grad_(requires_grad=False)
        model.mask_decoder.requires_grad_(requires_grad=False)
        self._with_padding = with_padding

    def forward(self, batch: Lessons, number: int) -> Losses:
        """Squared differences, the mean over channels and over the places that count."""
        del number
        embeddings_BCGG = self.model.image_encoder(batch.inputs_B3SS).float()
        error_BGG = F.mse_loss(embeddings_BCGG, batch.targets_BCGG.float(), reduction="none").mean(dim=1)
        return {"loss": error_BGG.mean() if self._with_padding else error_BGG[batch.covered_BGG].mean()}


def student(
    name: Student, image_size: int, seed: int, teacher: str, teacher_sha256: str, *, imagenet: bool
) -> SamModel:
    """An untrained student under the prompt encoder and mask decoder of its teacher, with its thresholds.

    Args:
        name: Of the image encoder.
        image_size: Side of its input in pixels, the teacher's.
        seed: Of the random weights.
        teacher: Name or URI of the teacher's weights, as `load_model` takes them.
        teacher_sha256: What the SHA-256 of that file must be.
        imagenet: Begin from timm's weights for ImageNet instead, all but the neck.

    Raises:
        CheckpointError: weights are not to be had, damaged, or not the teacher's.
        StorageError: the teacher's address cannot be read.
    """
    model = seeded_model(seed, image_size, STUDENTS[name])
    if imagenet:
        load_imagenet(model, imagenet_weights(name))
    checkpoint, address = read_checkpoint(teacher), storage.redact(teacher)
    if checkpoint.sha256 != teacher_sha256:
        raise CheckpointError(
            f"{address} is not the teacher that made the store: its SHA-256 is {checkpoint.sha256}, the "
            f"teacher's {teacher_sha256}. Pass --decoder with the address of the teacher's file."
        )
    load_decoder(model, checkpoint.tensors, address)
    model.thresholds = THRESHOLDS | checkpoint.metadata.get("thresholds", {})
    return model


def load_decoder(model: SamModel, teacher: Tensors, address: str) -> None:
    """Copy a teacher's prompt encoder and mask decoder into a model, strictly.

    Raises:
        CheckpointError: `teacher` lacks some of them; `address` says in the message where it is from.
    """
    encoder = {
        name: value for name, value in published_tensors(model).items() if name.startswith("image_encoder.")
    }
    rest = {name: value for name, value in teacher.items() if not name.startswith("image_encoder.")}
    load_tensors(model, encoder | rest, address)


def imagenet_weights(name: Student) -> Tensors:
    """timm's weights of a TinyViT for ImageNet-22k, under timm's names, from Hugging Face or its cache.

    Raises:
        CheckpointError: they are not to be had.
    """
    repository = f"timm/{name}_224.dist_in22k"
    try:
        return safetensors.torch.load_file(huggingface_hub.hf_hub_download(repository, "model.safetensors"))
    except (HfHubHTTPError, OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"Cannot get the ImageNet weights {repository} from Hugging Face: {error}. Where there is no network, "
            "copy them into the cache of huggingface_hub ($HF_HUB_CACHE), or leave --imagenet out."
        ) from error


def load_imagenet(model: SamModel, weights: Tensors) -> None:
    """Copy timm's classifier into the image encoder: all of it but the head; the neck stays as it is.

    Raises:
        CheckpointError: it is another TinyViT's.
    """
    encoder = model.image_encoder
    wanted = {name: value for name, value in encoder.state_dict().items() if not name.startswith("neck.")}
    given = {name: value for name, value in weights.items() if not name.startswith("head.")}
    differing = [
        name
        for name in sorted(wanted.keys() | given.keys())
        if name not in wanted or name not in given or wanted[name].shape != given[name].shape
    ]
    if differing or not isinstance(encoder, TinyVitEncoder):
        raise CheckpointError(f"The ImageNet weights do not fit the student: {', '.join(differing[:5])}.")
    encoder.load_state_dict(given, strict=False)


def _inside(sizes_B2: torch.Tensor, side: int) -> torch.Tensor:
    """B x side x side: True in the upper left corner of that height and width."""
    ticks = torch.arange(side, device=sizes_B2.device)
    return (ticks[:, None] < sizes_B2[:, 0, None, None]) & (ticks < sizes_B2[:, 1, None, None])
