"""Thresholds that weights carry, how they are chosen, and pictures of what they keep."""

from pathlib import Path

import numpy as np
import torch
from bsds_folder import write_bsds
from running import make_dataset, run, write_jpegs
from seeded import lively_state_dict, model_with
from skimage import data

from pipeline import rle
from pipeline.amg import MaskGenerator
from pipeline.amg.selfcheck import checked_model, self_checking_checkpoint
from pipeline.config import AmgConfig, MasksConfig, ModelConfig
from pipeline.evaluation.pictures import Picture
from pipeline.evaluation.thresholds import choose_thresholds
from pipeline.model import load_model
from pipeline.model.weights import seeded_model
from pipeline.overlay import overlay

OWN = {"pred_iou_thresh": 0.6, "stability_score_thresh": 0.75}


def with_thresholds(path: Path, dtype: torch.dtype = torch.float32) -> Path:
    model = seeded_model(0, 64)
    model.thresholds = OWN
    path.write_bytes(self_checking_checkpoint(model, dtype))
    return path


def test_weights_thresholds_are_defaults_that_arguments_override(tmp_path: Path, tiny_checkpoint: Path) -> None:
    model = load_model(str(with_thresholds(tmp_path / "own.safetensors")))
    assert model.thresholds == OWN
    config = MaskGenerator(model).config
    assert (config.pred_iou_thresh, config.stability_score_thresh) == (0.6, 0.75)
    config = MaskGenerator(model, pred_iou_thresh=0.0, stability_score_thresh=0.9).config
    assert (config.pred_iou_thresh, config.stability_score_thresh) == (0.0, 0.9)
    config = MaskGenerator(load_model(str(tiny_checkpoint))).config
    assert (config.pred_iou_thresh, config.stability_score_thresh) == (0.88, 0.95)


def test_the_thresholds_of_a_run_stand_in_its_documents(tmp_path: Path) -> None:
    checkpoint = with_thresholds(tmp_path / "own.safetensors")
    config = MasksConfig(
        images=str(write_jpegs(tmp_path / "images", 1)),
        output=str(tmp_path / "out"),
        amg=AmgConfig(points_per_side=1, stability_score_thresh=0.5),
        model=ModelConfig(checkpoint=str(checkpoint)),
    )
    amg = make_dataset(config, checkpoint).determinants["amg"]
    assert (amg["pred_iou_thresh"], amg["stability_score_thresh"]) == (0.6, 0.5)


def test_half_precision_weights_pass_their_own_check(tmp_path: Path) -> None:
    whole, half = (
        with_thresholds(tmp_path / f"{dtype}.safetensors", dtype) for dtype in (torch.float32, torch.float16)
    )
    assert half.stat().st_size < 0.55 * whole.stat().st_size
    model = checked_model(ModelConfig(checkpoint=str(half), device="cpu"))
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}


def test_chosen_thresholds_part_right_masks_from_wrong_ones() -> None:
    """A model's own masks as the truth: all of them, then the half that it predicts the best."""
    model = model_with(lively_state_dict(), 256)
    rgb = np.ascontiguousarray(data.coffee()[:120, :160])
    config = AmgConfig(points_per_side=4, box_nms_thresh=0.7)
    loose = config.model_copy(update={"pred_iou_thresh": -10.0, "stability_score_thresh": 0.0})
    found = [mask for mask in MaskGenerator(model, **dict(loose)).generate(rgb) if mask["area"]]
    masks = np.stack([rle.decode(mask["segmentation"]) for mask in found])
    assert len(masks) >= 4
    everything = choose_thresholds(model, [Picture("coffee", rgb, (masks,))], config)
    assert everything.recall >= 0.8
    half = choose_thresholds(model, [Picture("coffee", rgb, (masks[: len(masks) // 2],))], config)
    assert half.thresholds["pred_iou_thresh"] > everything.thresholds["pred_iou_thresh"]
    assert half.recall >= 0.8
    assert half.precision > 0.5


def test_the_command_writes_a_checkpoint_with_thresholds(tmp_path: Path, tiny_checkpoint: Path) -> None:
    rgb = np.ascontiguousarray(data.coffee()[:90, :120])
    labels = np.ones((90, 120), np.uint16)
    labels[:, 60:] = 2
    folder = write_bsds(tmp_path / "bsds", {"a": (rgb, [labels])}, "train")
    output = tmp_path / "tuned.safetensors"
    done = run(
        "jobs.tune_thresholds",
        f"--checkpoint={tiny_checkpoint}",
        f"--bsds={folder}",
        f"--output={output}",
        "--points-per-side=3",
        "--dtype=float16",
    )
    assert done.returncode == 0, done.stderr
    before, after = load_model(str(tiny_checkpoint)), load_model(str(output))
    assert after.thresholds != before.thresholds
    assert str(dict(after.thresholds)) in done.stderr
    for name, value in before.state_dict().items():
        torch.testing.assert_close(after.state_dict()[name], value, atol=1e-3, rtol=1e-3)


def test_masks_are_drawn_where_they_are() -> None:
    rgb = np.full((40, 60, 3), 100, np.uint8)
    large, small = np.zeros((2, 40, 60), bool)
    large[5:35, 5:50], small[10:20, 10:20] = True, True
    masks = [{"segmentation": rle.encode(mask), "area": int(mask.sum())} for mask in (small, large)]
    drawn = overlay(rgb, masks)
    changed = (drawn != rgb).any(axis=2)
    assert np.array_equal(changed, large)
    assert (rgb == 100).all()
    assert not np.array_equal(drawn[15, 15], drawn[30, 40])
