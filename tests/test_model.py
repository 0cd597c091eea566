"""The model: sizes, devices, precision, and the original SAM through the same door."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, cast

import numpy as np
import pytest
import torch
from seeded import (
    PHOTOGRAPHS,
    SamPredictor,
    grid,
    lively_state_dict,
    model_with,
    reference_with,
    sam_model_registry,
)
from segment_anything import sam_model_registry as original_registry

from pipeline.amg import MaskGenerator
from pipeline.errors import SettingsError
from pipeline.model import load_model, pick_device
from pipeline.model.sam import SamModel
from pipeline.model.weights import checkpoint_bytes, load_tensors, published_tensors, seeded_model


@pytest.mark.parametrize("image_size", [64, 256, 512])
def test_every_size_gives_the_references_embedding_and_logits(image_size: int) -> None:
    rgb, weights = PHOTOGRAPHS["portrait"](), lively_state_dict()
    predictor = SamPredictor(reference_with(weights, image_size))
    predictor.set_image(rgb)
    model = model_with(weights, image_size)
    embedding = model.encode(rgb)
    assert embedding.features_1CHW.shape == (1, 256, image_size // 16, image_size // 16)
    assert max(embedding.input_size) == image_size
    torch.testing.assert_close(embedding.features_1CHW, predictor.features, atol=1e-4, rtol=0)

    points = grid(3) * [rgb.shape[1], rgb.shape[0]]
    _, iou, logits = predictor.predict_torch(
        torch.from_numpy(predictor.transform.apply_coords(points, rgb.shape[:2]))[:, None],
        torch.ones(9, 1, dtype=torch.int),
    )
    predictions = model.predict(model.prepare(embedding), points)
    torch.testing.assert_close(predictions.iou_N3, iou, atol=1e-4, rtol=0)
    everything = model.upscale(predictions, torch.ones(9, 3, dtype=torch.bool))
    assert everything.shape == (27, model.mask_size, model.mask_size)
    scale = logits.std().item()
    torch.testing.assert_close(everything.view_as(logits), logits, atol=1e-4 * scale, rtol=0)


def test_only_wanted_masks_are_made_in_their_order() -> None:
    model = model_with(lively_state_dict(), 64)
    rgb = PHOTOGRAPHS["gray"]()
    predictions = model.predict(model.prepare(model.encode(rgb)), grid(3) * 512)
    everything = model.upscale(predictions, torch.ones(9, 3, dtype=torch.bool)).view(9, 3, 16, 16)
    wanted = torch.tensor([[0, 1, 1], [0, 0, 0], [1, 0, 0], *[[0, 0, 0]] * 5, [1, 1, 1]], dtype=torch.bool)
    torch.testing.assert_close(model.upscale(predictions, wanted), everything[wanted], atol=1e-4, rtol=1e-4)
    assert model.upscale(predictions, torch.zeros(9, 3, dtype=torch.bool)).shape == (0, 16, 16)


@pytest.mark.parametrize("image_size", [0, 32, 100, 1000, 1023])
def test_sizes_that_the_encoder_cannot_take_are_refused(image_size: int) -> None:
    with pytest.raises(SettingsError, match="multiple of 16"):
        SamModel("mobile_sam", image_size, "fp32")


@pytest.mark.parametrize("architecture", ["vit_b", "vit_l", "vit_h"])
def test_the_original_sam_has_one_size(architecture: Any) -> None:
    with pytest.raises(SettingsError, match="position embeddings"):
        SamModel(architecture, 512, "fp32")


def test_published_size_is_the_default(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(checkpoint_bytes(seeded_model(1, 64), {}))
    assert load_model(str(path), device="cpu").image_size == 1024
    assert load_model(str(path), device="cpu", image_size=512).image_size == 512
    with pytest.raises(SettingsError):
        load_model(str(path), device="cpu", image_size=500)


@pytest.mark.parametrize("device", ["auto", "cpu", torch.device("cpu")])
def test_devices(device: Any) -> None:
    available = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    assert pick_device(device).type == (available[0] if device == "auto" else "cpu")


def test_a_device_that_is_not_there_is_refused() -> None:
    absent = [
        name
        for name, there in {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}.items()
        if not there
    ]
    assert absent  # no machine has both
    for name in [*absent, "meta"]:
        with pytest.raises(SettingsError, match=name):
            pick_device(name)


@pytest.mark.parametrize("device", ["gpu", "", "cuda:x"])
def test_a_device_that_does_not_exist_is_refused(device: str) -> None:
    with pytest.raises(SettingsError):
        pick_device(device)


def test_bfloat16_is_close_to_float32_and_not_the_same() -> None:
    """On a CPU everything up to the predicted IoU stays in float32, and the upscaling does not."""
    rgb, weights = PHOTOGRAPHS["coffee"](), lively_state_dict()
    exact, fast = (model_with(weights, 256, precision) for precision in ("fp32", "bf16"))
    found = [model.predict(model.prepare(model.encode(rgb)), grid(3) * [600, 400]) for model in (exact, fast)]
    assert torch.equal(found[0].iou_N3, found[1].iou_N3)
    wanted = torch.ones(9, 3, dtype=torch.bool)
    masks, near = (model.upscale(few, wanted) for model, few in zip((exact, fast), found, strict=True))
    assert masks.dtype == near.dtype == torch.float32
    assert 0 < (masks - near).abs().max() < 0.1 * masks.abs().max()


@pytest.mark.parametrize(
    ("architecture", "device", "precision", "dtype"),
    [
        ("mobile_sam", "cpu", "bf16", torch.float32),
        ("vit_b", "cpu", "bf16", torch.bfloat16),
        ("vit_b", "cpu", "fp32", torch.float32),
    ],
)
def test_which_encoders_run_in_bfloat16(
    architecture: str, device: str, precision: str, dtype: torch.dtype
) -> None:
    model = SimpleNamespace(architecture=architecture, device=torch.device(device), precision=precision)
    x = torch.ones(2, 2)
    with SamModel._autocast(cast(SamModel, model)):
        assert (x @ x).dtype == dtype


def test_colours_and_padding_reach_the_encoder_as_the_references() -> None:
    rgb = PHOTOGRAPHS["portrait"]()
    sam = sam_model_registry["vit_t"]()
    pixels, size = seeded_model(1, 1024).preprocess(rgb)
    predictor = SamPredictor(sam)
    resized = predictor.transform.apply_image(rgb)
    expected = sam.preprocess(torch.from_numpy(resized.copy()).permute(2, 0, 1)[None])
    assert size == resized.shape[:2]
    torch.testing.assert_close(pixels, expected, atol=1e-6, rtol=0)


def test_the_original_sam_gives_its_own_embedding_and_answers(tmp_path: Path) -> None:
    """ViT-B, the smallest, with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        original = original_registry["vit_b"]().eval()
        for name, parameter in original.named_parameters():
            if name.endswith(("pos_embed", "rel_pos_h", "rel_pos_w")):  # initialised to zero
                torch.nn.init.normal_(parameter, std=0.1)
    path = tmp_path / "vit_b.pth"
    torch.save(original.state_dict(), path)
    model = load_model(str(path), device="cpu")
    assert model.architecture == "vit_b"
    assert set(published_tensors(model)) == set(original.state_dict())
    rgb = PHOTOGRAPHS["portrait"]()
    with pytest.raises(SettingsError):
        load_model(str(path), device="cpu", image_size=512)

    # Every layer's kind, size and epsilon; then, for time, arithmetic through two windowed and a global block.
    assert repr(model.image_encoder) == repr(original.image_encoder)
    for encoder in (model.image_encoder, original.image_encoder):
        assert [block.window_size for block in encoder.blocks] == [14, 14, 0] * 4
        encoder.blocks = encoder.blocks[:3]
    predictor = SamPredictor(original)
    predictor.set_image(rgb)
    embedding = model.encode(rgb)
    torch.testing.assert_close(embedding.features_1CHW, predictor.features, atol=1e-4, rtol=0)
    points = grid(1) * [300, 512]
    _, iou, logits = predictor.predict_torch(
        torch.from_numpy(predictor.transform.apply_coords(points, (512, 300)))[:, None],
        torch.ones(1, 1, dtype=torch.int),
    )
    predictions = model.predict(model.prepare(embedding), points)
    torch.testing.assert_close(predictions.iou_N3, iou, atol=1e-4, rtol=0)
    made = model.upscale(predictions, torch.ones(1, 3, dtype=torch.bool))
    torch.testing.assert_close(made, logits[0], atol=1e-4, rtol=0)


REFERENCE_FIRST: Final = """
import warnings
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import mobile_sam
import numpy as np
from pipeline.model.weights import seeded_model

model = seeded_model(1, 64)
features = model.encode(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3)).features_1CHW
answer = type(model.image_encoder.stages[1].blocks[0]).__module__, f"{features.double().sum():.4f}", features.shape
print(answer)
"""


def test_importing_the_reference_before_or_after_changes_nothing() -> None:
    """It replaces the TinyViTs in timm's registry by its own. Here ours came first: `conftest.py` imports it."""
    code = [sys.executable, "-c", REFERENCE_FIRST]
    reference_first = subprocess.run(code, capture_output=True, text=True, check=True).stdout
    names: dict[str, Any] = {}
    exec(REFERENCE_FIRST, names)
    assert f"{names['answer']}\n" == reference_first
    assert names["answer"][0] == "timm.models.tiny_vit"


def test_moved_and_reloaded_weights_are_used_at_once() -> None:
    """timm's attention remembers gathered biases from call to call."""
    rgb = PHOTOGRAPHS["gray"]()
    model = seeded_model(1, 64)
    before = model.encode(rgb).features_1CHW
    fresh = model_with(lively_state_dict(), 64).encode(rgb).features_1CHW
    load_tensors(model, lively_state_dict(), "x")
    after = model.encode(rgb).features_1CHW
    assert torch.equal(after, fresh)
    assert not torch.equal(after, before)


def test_generation_leaves_the_model_as_it_was() -> None:
    model = model_with(lively_state_dict(), 64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rgb = PHOTOGRAPHS["coffee"]()
    generator = MaskGenerator(model, points_per_side=4, pred_iou_thresh=0, stability_score_thresh=0.5)
    first, second = generator.generate(rgb), generator.generate(np.array(rgb))
    assert first
    assert first == second
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
