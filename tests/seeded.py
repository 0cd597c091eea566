"""What the tests of the model and of mask generation share: the reference, lively weights, photographs.

Freshly initialised weights make tests vacuous: predicted IoUs near 0, mask logits near 0, all boxes alike.
`lively_state_dict` starts from a seed and then sets what training would have set, by measuring the reference
on one photograph: predicted IoUs spread about 0.88, stability scores about 0.95, masks that follow their prompts.
"""

import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco
from skimage import data
from torch import nn

from pipeline.model.sam import SamModel
from pipeline.model.tinyvit import TINY_VIT_5M, TinyVitShape
from pipeline.model.weights import load_tensors

with warnings.catch_warnings():
    # It imports names that timm has moved, and replaces timm's registered TinyViTs by its own.
    warnings.simplefilter("ignore")
    from mobile_sam import SamAutomaticMaskGenerator, SamPredictor, sam_model_registry
    from mobile_sam.modeling import MaskDecoder, PromptEncoder, Sam, TinyViT, TwoWayTransformer

__all__ = [
    "PHOTOGRAPHS",
    "ReferenceGenerator",
    "Rgb",
    "Sam",
    "SamPredictor",
    "assert_parity",
    "grid",
    "lively_state_dict",
    "mask_ious",
    "model_with",
    "reference_sam",
    "reference_with",
    "sam_model_registry",
]

Rgb = NDArray[np.uint8]
StateDict = dict[str, torch.Tensor]

PUBLISHED_SIZE: Final = 1024
_CALIBRATION_SIZE: Final = 256


class _TinyViTOfAnySize(TinyViT):  # type: ignore[misc]
    """The reference's encoder, whose `forward` is written for 1024 only."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        tokens = self.patch_embed(pixels)
        for layer in self.layers:
            tokens = layer(tokens)
        side = self.img_size // 16
        image: torch.Tensor = self.neck(tokens.transpose(1, 2).reshape(len(tokens), -1, side, side))
        return image


def reference_sam(image_size: int = PUBLISHED_SIZE, shape: TinyVitShape = TINY_VIT_5M) -> Sam:
    """The MobileSAM of the package mobile_sam, untrained; its own unchanged build at 1024 with TinyViT 5M."""
    if (image_size, shape) == (PUBLISHED_SIZE, TINY_VIT_5M):
        return sam_model_registry["vit_t"]()
    encoder = _TinyViTOfAnySize(
        img_size=image_size,
        embed_dims=list(shape.widths),
        depths=[2, 2, 6, 2],
        num_heads=list(shape.heads),
        window_sizes=[7, 7, 14, 7],
        drop_path_rate=0.0,
    )
    prompts = PromptEncoder(
        embed_dim=256,
        image_embedding_size=(image_size // 16, image_size // 16),
        input_image_size=(image_size, image_size),
        mask_in_chans=16,
    )
    decoder = MaskDecoder(
        num_multimask_outputs=3,
        transformer=TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8),
        transformer_dim=256,
        iou_head_depth=3,
        iou_head_hidden_dim=256,
    )
    return Sam(encoder, prompts, decoder).eval()


def reference_with(state_dict: StateDict, image_size: int = PUBLISHED_SIZE) -> Sam:
    """The reference with a state dict.

    Its TinyViT gathers the attention biases in `eval()`, which its own build function calls before it loads a
    checkpoint; without a second call it computes with the biases of its initialisation.
    """
    sam = reference_sam(image_size)
    sam.load_state_dict(state_dict)
    return sam.eval()


def ReferenceGenerator(sam: Sam, **arguments: Any) -> Any:
    """The reference's mask generator, with our default form of masks.

    It decodes few prompts at a time, which on a CPU takes less than half the time of its default, 64, as their
    image tokens stay in the cache.
    """
    return SamAutomaticMaskGenerator(sam, **{"output_mode": "coco_rle", "points_per_batch": 4, **arguments})


def model_with(state_dict: StateDict, image_size: int, precision: Any = "fp32") -> SamModel:
    """Our model with a state dict of the reference's."""
    model = SamModel("mobile_sam", image_size, precision)
    load_tensors(model, state_dict, "the reference's state dict")
    model.weights_sha256 = "of no file"
    return model


@lru_cache
def lively_state_dict(seed: int = 0) -> StateDict:
    """A state dict whose answers spread about the default thresholds, at any image size."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sam = reference_sam(_CALIBRATION_SIZE)
        with torch.no_grad():
            _roughen(sam)
            sam.eval()  # it remembers attention biases from the last call of this
            _smooth_and_couple(sam.mask_decoder)
            _spread(sam)
    return dict(sam.state_dict())


def _roughen(sam: Sam) -> None:
    """Give every norm and bias a value that shows when it is misplaced."""
    for name, module in sam.named_modules():
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)) or type(module).__name__ == "LayerNorm2d":
            module.weight.uniform_(0.7, 1.3)
            module.bias.normal_(0, 0.1)
        elif isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.add_(0.02 * torch.randn_like(module.bias))
            if name.startswith("image_encoder"):
                module.weight.mul_(3)  # else attention adds next to nothing to its input
    for name, parameter in sam.named_parameters():
        if name.endswith("attention_biases"):
            parameter.normal_(0, 0.5)


def _smooth_and_couple(decoder: MaskDecoder) -> None:
    """Let pixels near a prompt attend to it, and neighbouring pixels of a mask resemble each other."""
    for layer in decoder.transformer.layers:
        attention = layer.cross_attn_image_to_token
        attention.k_proj.load_state_dict(attention.q_proj.state_dict())
        attention.q_proj.weight.mul_(30)
        attention.v_proj.weight.mul_(2)
        attention.out_proj.weight.mul_(2)
    for i in (0, 3):
        kernel = decoder.output_upscaling[i].weight
        kernel.copy_(2 * kernel.mean((2, 3), keepdim=True) + 0.1 * kernel)


def _spread(sam: Sam) -> None:
    """Scale features, IoUs and mask logits by what they are on one photograph."""
    sam.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix.mul_(0.5)  # larger objects
    predictor = SamPredictor(sam)
    norms = [module for module in sam.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in norms:
        module.train().momentum = 1.0  # take over this photograph's mean and variance
    predictor.set_image(PHOTOGRAPHS["coffee"]())
    for module in norms:
        module.eval()
    predictor.set_image(PHOTOGRAPHS["coffee"]())
    norm, features = sam.image_encoder.neck[3], predictor.features
    mean, std = features.mean((0, 2, 3)), features.std((0, 2, 3)) / 0.12
    norm.weight.div_(std)
    norm.bias.sub_(mean).div_(std)
    predictor.features = (features - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)

    # The first channel of the upscaled image becomes constant, and so an offset for each mask.
    decoder = sam.mask_decoder
    decoder.output_upscaling[3].weight[:, 0] = 0
    decoder.output_upscaling[3].bias[0] = 1
    constant = nn.functional.gelu(torch.tensor(1.0))
    heads = [mlp.layers[-1] for mlp in decoder.output_hypernetworks_mlps]
    for head in heads:
        head.weight[0] = 0
        head.bias[0] = 0
    height, width = predictor.input_size
    points = torch.from_numpy(grid(4) * [width, height])[:, None]
    _, iou, logits = predictor.predict_torch(points, torch.ones(16, 1, dtype=torch.int))
    logits = logits[..., : height // 4, : width // 4]

    last = decoder.iou_prediction_head.layers[-1]
    scale = 0.08 / iou.std(0)
    last.weight[1:] *= scale[:, None]
    last.bias[1:] = last.bias[1:] * scale + 0.88 - iou.mean(0) * scale
    for i, head in enumerate(heads[1:]):
        mask = logits[:, i]
        edge = torch.cat([mask[:, 0], mask[:, -1]], dim=1).mean()
        sign = 1 if mask.mean() > edge else -1  # most masks stay off the image's edges
        centred = sign * mask
        centred = centred - centred.flatten().kthvalue(int(0.8 * mask.numel())).values
        gain = _gain_of_spread_stability(centred)
        offset = centred[0, 0, 0] - sign * mask[0, 0, 0]
        head.weight *= sign * gain
        head.bias *= sign * gain
        head.bias[0] = gain * offset / constant


def _gain_of_spread_stability(logits: torch.Tensor) -> float:
    """The factor at which a quarter of the masks have a stability score above 0.95."""
    low, high = 1e-3, 1e6
    for _ in range(40):
        gain = (low * high) ** 0.5
        inner, outer = ((gain * logits > offset).sum((1, 2)) for offset in (1, -1))
        low, high = (gain, high) if (inner / outer).nanquantile(0.75) < 0.95 else (low, gain)
    return high


def grid(side: int) -> NDArray[np.float64]:
    """`side` x `side` points x, y in 0..1, as the reference lays them."""
    ticks = (np.arange(side) + 0.5) / side
    return np.stack(np.meshgrid(ticks, ticks), axis=-1).reshape(-1, 2)


def mask_ious(ours: list[dict[str, Any]], reference: list[dict[str, Any]]) -> NDArray[np.float64]:
    """IoU of each pair of masks in COCO RLE; two empty masks are the same."""
    ious = [
        coco.iou([a["segmentation"]], [b["segmentation"]], [0])[0, 0] if a["area"] or b["area"] else 1.0
        for a, b in zip(ours, reference, strict=True)
    ]
    return np.array(ious)


def assert_parity(ours: list[dict[str, Any]], reference: list[dict[str, Any]], *, stray_pixels: int = 0) -> None:
    """The same masks in the same order, as far as float32 allows.

    A pixel whose logit rounds to the other side of the threshold moves a box by a pixel and a mask's IoU below
    1. In masks of few pixels it also moves IoU and stability score by more than the limits, so that many such
    pixels of a mask may be excused.
    """
    assert len(ours) == len(reference)
    for a, b, iou in zip(ours, reference, mask_ious(ours, reference), strict=True):
        assert a.keys() == b.keys()
        assert a["point_coords"] == b["point_coords"]
        assert a["crop_box"] == b["crop_box"]
        assert abs(a["predicted_iou"] - b["predicted_iou"]) <= 1e-4
        excused = 2 * stray_pixels / max(b["area"], 1)
        assert a["stability_score"] == pytest.approx(b["stability_score"], abs=1e-4 + excused, nan_ok=True)
        assert iou >= 0.999 - excused
        assert np.abs(np.subtract(a["bbox"], b["bbox"])).max() <= (1 if iou < 1 else 0)
        assert abs(a["area"] - b["area"]) <= 1e-3 * b["area"] + stray_pixels
        assert a["segmentation"]["size"] == b["segmentation"]["size"]


def _resized(rgb: Rgb, width: int, height: int) -> Rgb:
    return np.array(Image.fromarray(rgb).resize((width, height), Image.Resampling.BICUBIC))


PHOTOGRAPHS: Final[dict[str, Callable[[], Rgb]]] = {
    "coffee": data.coffee,  # 600 x 400, below the model's size
    "portrait": lambda: np.ascontiguousarray(data.astronaut()[:, 100:400]),  # 300 x 512
    "large": lambda: _resized(data.rocket()[150:270], 2240, 420),  # wide, above 2000
    "gray": lambda: np.repeat(data.camera()[..., None], 3, axis=2),  # 512 x 512
    "square": lambda: _resized(data.retina(), 1024, 1024),  # as large as the model's input
    "small": lambda: _resized(data.chelsea(), 226, 150),
}
"""Photographs that come with scikit-image, uint8 RGB."""
