"""The promptable model: an image encoder under SAM's prompt encoder and mask decoder.

The decoder runs in two halves, because its IoU head reads tokens only: `predict` says how good each mask
would be, `upscale` makes the masks that are worth it. Together they answer as
`segment_anything.modeling.MaskDecoder` does with `multimask_output=True`.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, TwoWayTransformer
from torch import nn
from torch.nn import functional as F

from pipeline.errors import SettingsError
from pipeline.images import input_size_of
from pipeline.model.decoder import FastDecoder
from pipeline.model.image_tokens import ImageTables, ImageTokens
from pipeline.model.inference import hasten
from pipeline.model.tinyvit import (
    EMBEDDING_CHANNELS,
    STRIDE,
    TINY_VIT_5M,
    TINY_VIT_11M,
    TINY_VIT_21M,
    TinyVitEncoder,
    TinyVitShape,
)

Architecture = Literal["mobile_sam", "tiny_vit_11m", "tiny_vit_21m", "vit_b", "vit_l", "vit_h"]
"""Named by the image encoder; that of `mobile_sam` is TinyViT 5M."""
Precision = Literal["fp32", "bf16"]

TINY_VITS: Final[dict[Architecture, TinyVitShape]] = {
    "mobile_sam": TINY_VIT_5M,
    "tiny_vit_11m": TINY_VIT_11M,
    "tiny_vit_21m": TINY_VIT_21M,
}
"""The architectures whose image encoder is a TinyViT."""

PUBLISHED_IMAGE_SIZE: Final = 1024
MASK_THRESHOLD: Final = 0.0
"""A pixel belongs to a mask where its logit is above this."""
THRESHOLDS: Final = {"pred_iou_thresh": 0.88, "stability_score_thresh": 0.95}
"""Defaults of `SamAutomaticMaskGenerator`."""
PIXEL_MEAN: Final = (123.675, 116.28, 103.53)
PIXEL_STD: Final = (58.395, 57.12, 57.375)


def resized(rgb_HW3: NDArray[np.uint8], image_size: int) -> NDArray[np.uint8]:
    """An image at the size that the encoder sees it, as `input_size_of` says, not yet padded."""
    height, width = input_size_of(rgb_HW3.shape[:2], image_size)
    return np.array(Image.fromarray(rgb_HW3).resize((width, height), Image.Resampling.BILINEAR))


@dataclass(frozen=True)
class Embedding:
    """One encoded image."""

    features_1CHW: torch.Tensor
    """1 x 256 x S/16 x S/16."""
    original_size: tuple[int, int]
    """Height and width of the image."""
    input_size: tuple[int, int]
    """Height and width after the resize, before padding; the longer is the model's `image_size`."""


@dataclass(frozen=True)
class PreparedImage:
    """One encoded image, and what the decoder makes of it once for all its prompts."""

    embedding: Embedding
    tables: ImageTables


@dataclass(frozen=True)
class Predictions:
    """N prompts decoded as far as the predicted IoU, three masks a prompt."""

    image: PreparedImage
    iou_N3: torch.Tensor
    mask_tokens_N3C: torch.Tensor
    image_tokens: list[ImageTokens]
    """Of some prompts each."""


class SamModel(nn.Module):
    """A Segment Anything model for point prompts, in eval mode.

    Made by `pipeline.model.load_model`, which also fills in the weights.

    Attributes:
        weights_sha256: Of the checkpoint's bytes; empty before weights are loaded.
        expected: What the weights answer on the known picture of `pipeline.amg.selfcheck`; None where the
            checkpoint does not say.
        thresholds: `pred_iou_thresh` and `stability_score_thresh` that masks are kept by unless said otherwise:
            SAM's, or those that the checkpoint carries.
        decoder_class: Runs the mask decoder's weights.
    """

    def __init__(self, architecture: Architecture, image_size: int, precision: Precision) -> None:
        """Build with random weights.

        Raises:
            SettingsError: `image_size` is not one the encoder can take.
        """
        super().__init__()
        _check_image_size(architecture, image_size)
        self.architecture = architecture
        self.image_size = image_size
        self.precision = precision
        self.weights_sha256 = ""
        self.expected: Mapping[str, Any] | None = None
        self.thresholds: Mapping[str, float] = THRESHOLDS
        self.decoder_class: type[FastDecoder] = FastDecoder
        self.image_encoder = _image_encoder(architecture)
        grid = image_size // STRIDE
        self.prompt_encoder = PromptEncoder(
            embed_dim=EMBEDDING_CHANNELS,
            image_embedding_size=(grid, grid),
            input_image_size=(image_size, image_size),
            mask_in_chans=16,
        )
        self.mask_decoder = MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(depth=2, embedding_dim=EMBEDDING_CHANNELS, mlp_dim=2048, num_heads=8),
            transformer_dim=EMBEDDING_CHANNELS,
            iou_head_depth=3,
            iou_head_hidden_dim=256,
        )
        hasten(self)
        self.eval()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def mask_size(self) -> int:
        """Side of the low-resolution masks, `image_size` / 4."""
        return self.image_size // 4

    def set_image_size(self, image_size: int) -> None:
        """Take inputs of another size from now on. MobileSAM's weights fit any; a ViT's only their own.

        Raises:
            SettingsError: `image_size` is not one the encoder can take.
        """
        _check_image_size(self.architecture, image_size)
        self.image_size = image_size
        grid = image_size // STRIDE
        prompts = self.prompt_encoder
        prompts.input_image_size = (image_size, image_size)
        prompts.image_embedding_size = (grid, grid)
        prompts.mask_input_size = (4 * grid, 4 * grid)

    def encode(self, rgb_HW3: NDArray[np.uint8]) -> Embedding:
        """Run the image encoder on one RGB image of any size."""
        return self.encode_batch([rgb_HW3])[0]

    @torch.inference_mode()
    def encode_batch(self, images_HW3: Sequence[NDArray[np.uint8]]) -> list[Embedding]:
        """Run the image encoder on several images at once.

        Args:
            images_HW3: One RGB image at least, uint8, each of any size.

        Returns:
            An embedding an image, in order: what `encode` makes of it but for rounding.

        Raises:
            RuntimeError, MemoryError: memory ran out: `is_out_of_memory`.
        """
        pixels, input_sizes = zip(*map(self.preprocess, images_HW3), strict=True)
        pixels_B3SS = torch.cat(pixels).contiguous(memory_format=torch.channels_last)
        # cuDNN's convolutions round to TF32 by default, which is not float32.
        with self._autocast(), torch.backends.cudnn.flags(allow_tf32=False):
            features_BCHW = self.image_encoder(pixels_B3SS).float().contiguous()
        return [
            Embedding(features_1CHW, rgb_HW3.shape[:2], input_size)
            for features_1CHW, rgb_HW3, input_size in zip(
                features_BCHW.split(1), images_HW3, input_sizes, strict=True
            )
        ]

    def preprocess(self, rgb_HW3: NDArray[np.uint8]) -> tuple[torch.Tensor, tuple[int, int]]:
        """Resize the longer side to `image_size`, normalise, pad right and below with zeros.

        Returns:
            Pixels 1 x 3 x S x S, and height and width before padding.
        """
        small_HW3 = resized(rgb_HW3, self.image_size)
        height, width = small_HW3.shape[:2]
        pixels = torch.from_numpy(small_HW3).to(self.device).permute(2, 0, 1)
        mean, std = (
            torch.tensor(channel, device=self.device).view(3, 1, 1) for channel in (PIXEL_MEAN, PIXEL_STD)
        )
        pixels = (pixels - mean) / std
        padded = F.pad(pixels, (0, self.image_size - width, 0, self.image_size - height))
        return padded[None], (height, width)

    @torch.inference_mode()
    def prepare(self, embedding: Embedding) -> PreparedImage:
        """Make what all prompts of an image share."""
        encoder = self.prompt_encoder
        dense_1CHW = encoder.no_mask_embed.weight.view(1, -1, 1, 1)
        tables = self.fast_decoder.image(embedding.features_1CHW, dense_1CHW, encoder.get_dense_pe())
        return PreparedImage(embedding, tables)

    @torch.inference_mode()
    def predict(self, image: PreparedImage, points_N2: NDArray[np.float64]) -> Predictions:
        """Decode N foreground points, each a prompt of its own, as far as the IoU head.

        Args:
            image: What `prepare` returned.
            points_N2: x and y in pixels of the image that was encoded.
        """
        original, resized = image.embedding.original_size, image.embedding.input_size
        scale = np.array([resized[1] / original[1], resized[0] / original[0]])
        # Metal has no float64; elsewhere the reference normalises coordinates in it.
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        points = torch.as_tensor(points_N2 * scale, dtype=dtype, device=self.device)[:, None]
        labels = torch.ones(points.shape[:2], dtype=torch.int, device=self.device)
        decoder = self.mask_decoder
        sparse, _ = self.prompt_encoder(points=(points, labels), boxes=None, masks=None)
        output_tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        tokens = torch.cat([output_tokens.expand(len(points), -1, -1), sparse], dim=1)
        with torch.cuda.device_of(tokens):  # type: ignore[no-untyped-call]  # Triton launches on the current one
            hidden, image_tokens = self.fast_decoder.run(image.tables, tokens, self._prompts_at_once)
        iou = decoder.iou_prediction_head(hidden[:, 0])
        multimask = slice(1, None)  # mask 0 is for prompts that leave no ambiguity
        mask_tokens = hidden[:, 1 : 1 + decoder.num_mask_tokens]
        return Predictions(image, iou[:, multimask], mask_tokens[:, multimask], image_tokens)

    @torch.inference_mode()
    def upscale(self, predictions: Predictions, wanted_N3: torch.Tensor) -> torch.Tensor:
        """Make the masks that are wanted.

        Args:
            predictions: What `predict` returned.
            wanted_N3: True where a mask is to be made.

        Returns:
            Logits K x S/4 x S/4, K the number of wanted masks, in the order of `wanted_N3`'s rows.
        """
        mask_tokens = predictions.mask_tokens_N3C
        heads = self.mask_decoder.output_hypernetworks_mlps[1:]
        weights = torch.stack([head(mask_tokens[:, i]) for i, head in enumerate(heads)], dim=1)
        logits_KSS = torch.empty(int(wanted_N3.sum()), self.mask_size, self.mask_size, device=self.device)
        start = made = 0
        for few in predictions.image_tokens:
            part = slice(start, start := start + len(few))
            wanted = wanted_N3[part]
            prompts = wanted.any(dim=1)
            if not prompts.any():
                continue
            tokens, few_weights, kept = few.select(prompts), weights[part][prompts], wanted[prompts]
            if len(kept) == 1:  # of several prompts not all want the same ones
                few_weights, kept = few_weights[:, kept[0]], kept[:, kept[0]]
            kept_KSS = logits_KSS[made : (made := made + int(kept.sum()))]
            shape = (*kept.shape, self.mask_size, self.mask_size)
            all_NMSS = kept_KSS.view(shape) if kept.all() else logits_KSS.new_empty(shape)
            self.fast_decoder.upscale(predictions.image.tables, tokens, few_weights, all_NMSS)
            if not kept.all():
                kept_KSS[:] = all_NMSS[kept]
        return logits_KSS

    @property
    def fast_decoder(self) -> FastDecoder:
        """The mask decoder's weights, to be run on many prompts of an image."""
        exact, fast = torch.float32, torch.float32 if self.precision == "fp32" else torch.bfloat16
        # On a CPU bfloat16 decides on next to the same time among near duplicates differently.
        return self.decoder_class(self.mask_decoder, exact if self.device.type == "cpu" else fast, fast)

    @property
    def points_per_batch(self) -> int:
        """Prompts that `predict` is given at once unless said otherwise: so many that they fill the device."""
        return 256 if self.device.type == "cuda" else 64

    @property
    def images_per_batch(self) -> int:
        """Images that `encode_batch` is given at once. A single one does not fill a GPU in a TinyViT."""
        return 4 if self.device.type == "cuda" and self.architecture in TINY_VITS else 1

    @property
    def _prompts_at_once(self) -> int:
        return self.decoder_class.prompts_at_once() if self.device.type == "cpu" else 1024

    def _autocast(self) -> AbstractContextManager[None]:
        # On a CPU a TinyViT takes about a tenth of the time; bfloat16 would save half of that, and cost accuracy.
        exact = self.precision == "fp32" or (self.device.type == "cpu" and self.architecture in TINY_VITS)
        return torch.autocast(self.device.type, torch.bfloat16, enabled=not exact)


def _check_image_size(architecture: Architecture, image_size: int) -> None:
    if image_size % STRIDE or image_size < 4 * STRIDE:
        raise SettingsError(f"image_size {image_size}: must be a multiple of {STRIDE}, at least 64.")
    if architecture not in TINY_VITS and image_size != PUBLISHED_IMAGE_SIZE:
        raise SettingsError(
            f"image_size {image_size}: {architecture}'s position embeddings are made for "
            f"{PUBLISHED_IMAGE_SIZE}; leave it out, or use mobile_sam."
        )


_VIT: Final = {
    "vit_b": {"embed_dim": 768, "depth": 12, "num_heads": 12, "global_attn_indexes": (2, 5, 8, 11)},
    "vit_l": {"embed_dim": 1024, "depth": 24, "num_heads": 16, "global_attn_indexes": (5, 11, 17, 23)},
    "vit_h": {"embed_dim": 1280, "depth": 32, "num_heads": 16, "global_attn_indexes": (7, 15, 23, 31)},
}


def _image_encoder(architecture: Architecture) -> nn.Module:
    if architecture in TINY_VITS:
        return TinyVitEncoder(TINY_VITS[architecture])
    vit: nn.Module = ImageEncoderViT(
        **_VIT[architecture],
        img_size=PUBLISHED_IMAGE_SIZE,
        mlp_ratio=4,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        patch_size=STRIDE,
        qkv_bias=True,
        use_rel_pos=True,
        window_size=14,
        out_chans=EMBEDDING_CHANNELS,
    )
    return vit
