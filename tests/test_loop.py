"""The training loop: optimisers, schedule, average, checkpoints, resume, export."""

import math
from pathlib import Path

import pytest
import torch
from small_training import ALONE, FEW, batches, steps, training
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.amg.selfcheck import self_checking_checkpoint
from pipeline.errors import Diverged, TrainingDataError
from pipeline.model import load_model
from pipeline.model.weights import seeded_model
from pipeline.training.config import OptimizerConfig
from pipeline.training.coupled import Coupled
from pipeline.training.examples import Batch, Batches, scene_source
from pipeline.training.export import export
from pipeline.training.loop import Checkpoints, Training, schedule


def test_training_learns_one_batch() -> None:
    [batch] = [Batches(scene_source(64, 0), **FEW)[0]]
    untrained = training(steps(40))
    history = []
    untrained.run(iter([batch] * 40), 1, lambda t: history.append(dict(t.position.losses)))
    model = untrained.model.eval()
    with torch.no_grad():
        losses = Coupled(model)(batch, 0)  # type: ignore[arg-type]
    assert losses["loss"] < 0.5 * history[0]["loss"]
    assert losses["miou"] > history[0]["miou"] + 0.2


def test_every_part_of_the_model_is_trained() -> None:
    begun = training(steps(4), box_share=0.5, corrective_clicks=1)
    before = {name: value.clone() for name, value in begun.model.named_parameters()}
    reached: set[str] = set()

    def note(step: Training) -> None:
        reached.update(name for name, value in step.model.named_parameters() if value.grad is not None)

    begun.run(batches(), 1, note)
    assert reached == before.keys()
    same = {name for name, value in begun.model.named_parameters() if torch.equal(value, before[name])}
    # Of the three masks of a click only the best is corrected, in so few steps perhaps always the same one.
    heads = {name.split(".")[2] for name in same}
    assert all(name.startswith("mask_decoder.output_hypernetworks_mlps.") for name in same)
    assert heads < {"1", "2", "3"}


def test_training_in_bfloat16_learns_and_keeps_float32_weights() -> None:
    [batch] = [Batches(scene_source(64, 0), **FEW)[0]]
    begun = training(OptimizerConfig(steps=45, warmup_steps=2, learning_rate=1e-3), grouping=0.2)
    assert begun.config.precision == "bf16"
    history = []
    begun.run(iter([batch] * 45), 1, lambda t: history.append(dict(t.position.losses)))
    assert {p.dtype for p in begun.objective.parameters()} == {torch.float32}
    with torch.no_grad():
        losses = Coupled(begun.model.eval())(batch, 0)  # type: ignore[arg-type]
    assert losses["loss"] < 0.6 * history[0]["loss"]
    assert losses["miou"] > history[0]["miou"] + 0.15


def test_weights_decay_but_not_biases_norms_and_embeddings() -> None:
    begun = training(steps(1, weight_decay=0.07), **ALONE)
    [adamw] = begun.optimizers
    decays = {id(p): group["weight_decay"] for group in adamw.param_groups for p in group["params"]}
    expected = {}
    for path, module in begun.objective.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            weight = isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)) and name == "weight"
            expected[f"{path}.{name}"] = 0.07 if weight else 0
    named = dict(begun.objective.named_parameters())
    assert {name: decays[id(parameter)] for name, parameter in named.items()} == expected
    kept = {name.rsplit(".", 1)[1] for name, decay in expected.items() if not decay}
    assert kept == {"weight", "bias", "attention_biases"}
    assert expected["model.mask_decoder.mask_tokens.weight"] == 0


def test_gradients_are_clipped() -> None:
    norms = {}
    for clip in (0, 1e-3):
        begun = training(steps(1, clip=clip))
        begun.run(batches(), 1)
        gradients = [p.grad for p in begun.objective.parameters() if p.grad is not None]
        norms[clip] = float(nn.utils.get_total_norm(gradients))
    assert norms[0] > 0.1
    assert norms[1e-3] == pytest.approx(1e-3, rel=1e-3)


def test_muon_takes_the_matrices_of_linear_layers() -> None:
    begun = training(steps(1, optimizer="muon", warmup_steps=0), grouping=0.5)
    muon, adamw = begun.optimizers
    taken = [{id(p) for group in one.param_groups for p in group["params"]} for one in (muon, adamw)]
    names = {id(p): name for name, p in begun.objective.named_parameters()}
    assert not taken[0] & taken[1]
    assert taken[0] | taken[1] == names.keys()
    assert {"model.image_encoder.stages.1.blocks.0.attn.qkv.weight", "grouping.head.0.weight"} <= {
        names[i] for i in taken[0]
    }
    assert not any("attention_biases" in names[i] or "embed" in names[i] for i in taken[0])
    before = {name: p.clone() for name, p in begun.objective.named_parameters() if id(p) in taken[0]}
    begun.run(batches(), 1)
    still = {
        name for name, p in begun.objective.named_parameters() if name in before and torch.equal(p, before[name])
    }
    assert not {name for name in still if "hypernetworks" not in name}


@pytest.mark.parametrize("supported", [True, False])
def test_a_cpu_slow_at_bfloat16_is_said(
    *, supported: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    training(steps(1))
    assert not caplog.messages
    training(steps(1, optimizer="muon"))
    training(steps(1, precision="bf16"))
    avoided = [message.rpartition("avoid ")[2] for message in caplog.messages]
    assert avoided == ([] if supported else ["--optimizer muon.", "--precision bf16."])


@pytest.mark.parametrize(("optimizer", "count"), [("adamw", 6), ("muon", 2)])
def test_a_resumed_training_is_the_undisturbed_one(tmp_path: Path, optimizer: str, count: int) -> None:
    config = steps(count, optimizer=optimizer)
    whole = training(config, **ALONE)
    losses: list[float] = []
    whole.run(batches(), 1, lambda t: losses.append(t.position.losses["loss"]))
    uri = str(tmp_path / "x.training")
    first = training(config, **ALONE)
    first.run(batches(), 0.5)
    Checkpoints(uri, 1, {"seed": 1}).write(first)
    second = training(config, **ALONE)
    checkpoints = Checkpoints(uri, 1, {"seed": 1})
    assert checkpoints.resume(second)
    assert second.position == first.position
    resumed: list[float] = []
    second.run(batches(count // 2), 1, lambda t: resumed.append(t.position.losses["loss"]))
    assert resumed == pytest.approx(losses[count // 2 :], abs=1e-5)
    for name, value in whole.average.items():
        torch.testing.assert_close(second.average[name], value, atol=1e-5, rtol=1e-4)
    with pytest.raises(TrainingDataError, match=r"seed \(1 there, 2 here\)"):
        Checkpoints(uri, 1, {"seed": 2}).resume(second)
    assert not Checkpoints(str(tmp_path / "none"), 1, {}).resume(second)


def test_a_checkpoint_goes_on_with_another_number_of_workers(tmp_path: Path) -> None:
    """What averages gradients over workers is no part of it."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/workers", rank=0, world_size=1)
    try:
        torch.manual_seed(3)
        model = seeded_model(3, 64)
        parallel = DistributedDataParallel(Coupled(model), find_unused_parameters=True)
        several = Training(parallel, model, steps(6))
        several.run(batches(), 0.5)
        kept = several.checkpoint({})
        alone = training(steps(6))
        alone.restore(kept, {})
        alone.run(batches(3), 1)
        several.restore(alone.checkpoint({}), {})
    finally:
        distributed.destroy_process_group()
    undisturbed = training(steps(6))
    undisturbed.run(batches(), 1)
    assert several.position.step == 6
    for name, value in undisturbed.model.state_dict().items():
        torch.testing.assert_close(several.model.state_dict()[name], value, atol=1e-5, rtol=1e-4)


OWN = {"pred_iou_thresh": 0.6, "stability_score_thresh": 0.75}


def test_the_export_has_the_thresholds_of_the_weights_it_began_from(tmp_path: Path) -> None:
    model = seeded_model(0, 64)
    model.thresholds = OWN
    path = tmp_path / "begun.safetensors"
    path.write_bytes(self_checking_checkpoint(model))
    begun = load_model(str(path), "cpu")
    exported = tmp_path / "exported.safetensors"
    exported.write_bytes(export(Training(Coupled(begun), begun, steps(1)), 64))
    assert load_model(str(exported), "cpu").thresholds == OWN


class Exploding(nn.Module):
    """Whose third loss is no number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))

    def forward(self, _batch: Batch, number: int) -> dict[str, torch.Tensor]:
        return {"loss": self.weight.sum() * (math.nan if number == 2 else 1)}


def test_a_loss_that_is_no_number_ends_the_training() -> None:
    model = Exploding()
    begun = Training(model, model, steps(10))
    named = Batches(scene_source(64, 5), **FEW)
    with pytest.raises(Diverged, match="step 2") as caught:
        begun.run((named[number] for number in range(10)), 1)
    assert all(name in str(caught.value) for name in named[2].names)
    assert begun.position.step == 2
    assert model.weight.isfinite().all()
    assert caught.value.exit_code == 5


def test_the_average_follows_the_weights() -> None:
    model = Exploding()
    begun = Training(model, model, steps(2, ema_decay=0.5, learning_rate=0.1, weight_decay=0, warmup_steps=0))
    seen = [model.weight.detach().clone()]
    begun.run(batches(), 1, lambda _: seen.append(model.weight.detach().clone()))
    after_one = seen[0] * (2 / 11) + seen[1] * (9 / 11)
    assert torch.allclose(begun.average["weight"], after_one * (3 / 12) + seen[2] * (9 / 12))


def test_the_learning_rate_rises_and_falls() -> None:
    config = steps(100, warmup_steps=10, final_rate=0.1)
    assert schedule(0, 0, config) == pytest.approx(0.1)
    assert schedule(9, 0, config) == pytest.approx(1)
    assert schedule(50, 0.5, config) == pytest.approx(0.55)
    assert schedule(99, 1, config) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="steps or minutes"):
        OptimizerConfig(steps=1, minutes=1)
