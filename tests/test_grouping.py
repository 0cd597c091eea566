"""The auxiliary objective: which pixels belong together."""

import torch
from small_training import ALONE, FEW, batches, steps, training
from torch.nn import functional as F

from pipeline.model.weights import seeded_model
from pipeline.training.coupled import Coupled
from pipeline.training.examples import Batch, Batches, scene_source
from pipeline.training.grouping import Grouping
from pipeline.training.loop import Training


def test_grouping_asks_about_the_seeds_pixels() -> None:
    batch = Batches(scene_source(64, 0), **FEW)[0]
    grouping, other = Grouping(seed=1), Grouping(seed=2)
    other.load_state_dict(grouping.state_dict())
    features = torch.randn(2, 32, 16, 16)
    with torch.no_grad():
        losses = [float(one(features, batch, n)["grouping"]) for one in (grouping, other) for n in (0, 1, 0)]
    assert losses[0] == losses[2]
    assert len(set(losses)) == 4


def test_grouping_comes_first_alone_and_then_along() -> None:
    begun = training(steps(4), **ALONE)
    before = {name: value.clone() for name, value in begun.objective.named_parameters()}
    seen: list[set[str]] = []
    changed: list[set[str]] = []

    def note(step: Training) -> None:
        seen.append(set(step.position.losses))
        now = dict(step.objective.named_parameters())
        changed.append({name for name, value in now.items() if not torch.equal(value, before[name])})

    begun.run(batches(), 1, note)
    alone, together = {"loss", "grouping", "grouping_miou"}, {"focal", "dice", "iou", "miou"}
    assert seen == [alone, alone, alone | together, alone | together]
    parts = ("model.image_encoder.", "model.mask_decoder.output_upscaling.", "grouping.head.")
    assert all(name.startswith(parts) for name in changed[1])
    assert all(any(name.startswith(part) for name in changed[1]) for part in parts)
    assert any(name.startswith("model.mask_decoder.transformer.") for name in changed[2])
    assert begun.average.keys() == begun.model.state_dict().keys()  # the head stays out of what is exported


def test_grouping_weighs_what_it_says() -> None:
    batch = Batches(scene_source(64, 0), **FEW)[0]
    model = seeded_model(3, 64)
    with torch.no_grad():
        alone = Coupled(model)(batch, 0)
        together = Coupled(model, grouping=0.5)(batch, 0)
    torch.testing.assert_close(together["loss"], alone["loss"] + 0.5 * together["grouping"])


def test_features_that_tell_segments_apart_are_grouped() -> None:
    """A head learns to read features that are the segments' own; of noise it learns less."""
    left = torch.zeros(1, 2, 8, 8, dtype=torch.uint8)
    left[:, 0, :, :4] = 255
    left[:, 1, :, 4:] = 255
    nothing = torch.zeros(1, 1)
    batch = Batch(("halves",), nothing, left, nothing.long(), nothing, nothing)
    told = F.pad(left.float() / 64, (0, 0, 0, 0, 0, 30))
    noise = torch.randn(told.shape, generator=torch.Generator().manual_seed(0))
    results = {}
    for name, features in {"told": told, "noise": noise}.items():
        torch.manual_seed(0)
        grouping = Grouping(anchors=32)
        optimizer = torch.optim.Adam(grouping.parameters(), 3e-3)
        for number in range(150):
            optimizer.zero_grad()
            # Noise is new each time, so that it cannot be learnt by heart.
            losses = grouping(features if name == "told" else noise.roll((number,) * 3, (1, 2, 3)), batch, number)
            losses["grouping"].backward()
            optimizer.step()
        results[name] = losses
    assert results["told"]["grouping_miou"] > 0.99
    assert results["told"]["grouping"] < 0.1
    assert results["noise"]["grouping_miou"] < 0.95
    assert results["noise"]["grouping"] > 0.3


def test_pixels_of_no_mask_are_not_asked_about() -> None:
    nothing = torch.zeros(1, 1)
    batch = Batch(("none",), nothing, torch.zeros(1, 2, 8, 8, dtype=torch.uint8), nothing.long(), nothing, nothing)
    losses = Grouping()(torch.randn(1, 32, 8, 8), batch, 0)
    assert losses["grouping"] == 0
