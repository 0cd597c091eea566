"""Checkpoints: the published names, strict loading, and files that must be refused (case 42)."""

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import safetensors.torch
import torch
from seeded import StateDict, reference_sam
from small_weights import load

from pipeline.errors import CheckpointError, SelfCheckError, StorageError
from pipeline.model import load_model
from pipeline.model.sam import SamModel
from pipeline.model.weights import (
    PUBLISHED,
    UNUSED,
    architecture_of,
    checkpoint_bytes,
    load_tensors,
    parse_checkpoint,
    published_tensors,
    read_checkpoint,
    seeded_model,
)

FACTS: Final[dict[str, Any]] = json.loads(Path(__file__).with_name("mobile_sam_tensors.json").read_text())
"""Of the published mobile_sam.pt, read from the file's own index."""

NECK: Final = "image_encoder.neck.0.weight"


@pytest.fixture
def tensors(model: SamModel) -> StateDict:
    return dict(published_tensors(model))


def saved(path: Path, content: object) -> str:
    torch.save(content, path)
    return str(path)


def test_names_and_shapes_are_those_of_the_published_checkpoint(model: SamModel) -> None:
    ours = {name: list(tensor.shape) for name, tensor in published_tensors(model).items()}
    unused = {name: list(shape) for name, shape in UNUSED.items()}
    assert len(FACTS["tensors"]) == 439
    assert ours | unused == FACTS["tensors"]
    assert not ours.keys() & unused.keys()


def test_names_and_shapes_are_those_of_the_reference(model: SamModel) -> None:
    reference = {name: tensor.shape for name, tensor in reference_sam().state_dict().items()}
    assert {name: list(shape) for name, shape in reference.items()} == FACTS["tensors"]


def test_published_address_and_hash() -> None:
    assert PUBLISHED["mobile_sam"] == (FACTS["url"], FACTS["sha256"])
    assert all(len(bytes.fromhex(sha256)) == 32 for _, sha256 in PUBLISHED.values())
    assert PUBLISHED.keys() == {"mobile_sam", "vit_b", "vit_l", "vit_h"}


@pytest.mark.parametrize("suffix", ["pt", "pth", "safetensors"])
def test_checkpoint_is_loaded(suffix: str, tensors: StateDict, tmp_path: Path) -> None:
    path = tmp_path / f"x.{suffix}"
    if suffix == "safetensors":
        safetensors.torch.save_file(tensors, path)
    else:
        torch.save(tensors, path)
    loaded = load(path)
    assert all(torch.equal(value, tensors[name]) for name, value in published_tensors(loaded).items())
    assert loaded.weights_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert not loaded.training
    assert load(path.as_uri()).weights_sha256 == loaded.weights_sha256


def test_content_decides_the_format_not_the_name(checkpoint: bytes, tensors: StateDict, tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(checkpoint)
    assert load(tmp_path / "x.pt").image_size == 64
    assert load(saved(tmp_path / "x.safetensors", tensors)).image_size == 64


def test_checkpoint_of_the_reference_with_its_unused_tensors_is_loaded(tmp_path: Path) -> None:
    reference = reference_sam().state_dict()
    loaded = load(saved(tmp_path / "x.pt", reference))
    assert set(reference) - set(published_tensors(loaded)) == set(UNUSED)


def missing(tensors: StateDict) -> None:
    del tensors[NECK]


def unexpected(tensors: StateDict) -> None:
    tensors["image_encoder.extra"] = torch.zeros(2)


def misshapen(tensors: StateDict) -> None:
    tensors[NECK] = torch.zeros(7, 320, 1, 1)


def misshapen_but_unused(tensors: StateDict) -> None:
    tensors["image_encoder.head.bias"] = torch.zeros(999)


def not_finite(tensors: StateDict) -> None:
    tensors[NECK] = torch.full_like(tensors[NECK], torch.nan)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (missing, f"1 missing: {NECK}."),
        (unexpected, "1 unexpected: image_encoder.extra."),
        (misshapen, f"1 of another shape: {NECK} [7, 320, 1, 1] instead of [256, 320, 1, 1]."),
        (misshapen_but_unused, "1 unexpected: image_encoder.head.bias."),
        (not_finite, f"1 not finite: {NECK}."),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    damage: Callable[[StateDict], None], message: str, tensors: StateDict, tmp_path: Path
) -> None:
    damage(tensors)
    with pytest.raises(CheckpointError) as caught:
        load(saved(tmp_path / "x.pt", tensors))
    assert str(caught.value).endswith(message)
    assert str(tmp_path / "x.pt") in str(caught.value)


def test_many_faults_are_counted_not_listed(model: SamModel, tensors: StateDict) -> None:
    some = {name: tensor for name, tensor in tensors.items() if not name.startswith("mask_decoder")}
    with pytest.raises(CheckpointError, match=r"1\d\d missing: mask_decoder.* and 1\d\d more"):
        load_tensors(model, some, "x")


def test_a_load_that_changes_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "x.pt", dict(published_tensors(seeded_model(5, 64))))
    monkeypatch.setattr("pipeline.model.load_tensors", lambda *arguments: None)
    with pytest.raises(SelfCheckError, match="left the model as it was"):
        load(path)


class Malice:
    """A pickle that would create a file when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["pickle", "torch", "torch, among tensors", "torch, old format"])
def test_case_42_code_in_a_pickle_is_refused_and_not_executed(
    form: str, tensors: StateDict, tmp_path: Path
) -> None:
    marker, path = tmp_path / "marker", tmp_path / "x.pt"
    if form == "pickle":
        path.write_bytes(pickle.dumps(Malice(marker)))
    elif form == "torch":
        torch.save(Malice(marker), path)
    elif form == "torch, among tensors":
        torch.save({**tensors, "extra": Malice(marker)}, path)
    else:
        torch.save({**tensors, "extra": Malice(marker)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="refused"):
        load(path)
    assert not marker.exists()
    torch.load(path, weights_only=False) if form != "pickle" else pickle.loads(path.read_bytes())
    assert marker.exists()  # it was a real one


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.5, 0.999, 0.99999])
@pytest.mark.parametrize("suffix", ["pt", "old.pt", "safetensors"])
def test_case_42_truncated_checkpoint_is_refused(
    suffix: str, share: float, checkpoint: bytes, tensors: StateDict, tmp_path: Path
) -> None:
    path = tmp_path / f"x.{suffix}"
    if suffix == "safetensors":
        path.write_bytes(checkpoint)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=suffix == "pt")
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(CheckpointError, match=str(path)):
        load(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<!DOCTYPE html><html><body>Not Found</body></html>",
        b"\n  <html>",
        b"just text",
        bytes(range(256)) * 40,
        torch.randn(1000, generator=torch.Generator().manual_seed(0)).numpy().tobytes(),
        b"\xff" * 7 + b"\x7f{" + b"}" * 100,
        (2).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (20).to_bytes(8, "little") + b'{"__metadata__": 3} ',
        pickle.dumps({"a": 1}),
        b"PK\x03\x04" + b"0" * 100,
    ],
    ids=lambda content: repr(content[:16]),
)
def test_what_is_no_checkpoint_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        load(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_random_bytes_are_refused(checkpoint: bytes, tensors: StateDict, tmp_path: Path) -> None:
    """Noise, and noise in the places of real checkpoints that readers look at first."""
    old = tmp_path / "old.pt"
    torch.save({NECK: tensors[NECK]}, old, _use_new_zipfile_serialization=False)
    random = np.random.default_rng(0)
    for start in (checkpoint[:400], old.read_bytes()[:400], pickle.dumps({"a": [1, {2: "b"}]}, 2), b""):
        for _ in range(150):
            data = bytearray(start + random.bytes(40))
            for place in random.integers(0, len(data), 1 + len(start) // 100):
                data[place] = random.integers(256)
            with pytest.raises(CheckpointError):
                parse_checkpoint(bytes(data), "x")


def test_case_42_html_page_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(b"<!DOCTYPE html><html><body>Sign in</body></html>")
    with pytest.raises(CheckpointError, match="HTML"):
        load(path)


@pytest.mark.parametrize("content", [[1, 2], {"model": {}}, {"a": 1}, torch.zeros(3)], ids=str)
def test_what_is_no_state_dict_is_refused(content: object, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a state dict"):
        load(saved(tmp_path / "x.pt", content))


def test_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"absent\.pt"):
        load(tmp_path / "absent.pt")


def test_architecture_is_told_from_shapes(model: SamModel) -> None:
    assert architecture_of(published_tensors(model)) == "mobile_sam"
    for name, width in {"vit_b": 768, "vit_l": 1024, "vit_h": 1280}.items():
        assert architecture_of({"image_encoder.pos_embed": torch.empty(1, 64, 64, width)}) == name
    for unknown in ({}, {"image_encoder.pos_embed": torch.empty(1, 64, 64, 384)}, {"weight": torch.empty(2)}):
        with pytest.raises(CheckpointError, match="no known architecture"):
            architecture_of(unknown)


def test_own_checkpoint_round_trip(model: SamModel, tmp_path: Path) -> None:
    metadata = {"image_size": 128, "expected": {"predicted_iou": [0.1, 0.2]}, "note": "ä"}
    path = tmp_path / "x.safetensors"
    path.write_bytes(checkpoint_bytes(model, metadata))
    read = read_checkpoint(str(path))
    assert read.metadata == metadata
    assert {name: list(tensor.shape) for name, tensor in read.tensors.items()} == FACTS["tensors"]
    loaded = load_model(str(path), device="cpu")
    assert loaded.image_size == 128  # as the checkpoint says
    assert loaded.expected == metadata["expected"]
    assert load(path).image_size == 64  # as the caller says
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_own_checkpoint_loads_strictly_into_the_reference(checkpoint: bytes, model: SamModel) -> None:
    sam = reference_sam()
    sam.load_state_dict(safetensors.torch.load(checkpoint), strict=True)
    for name, tensor in published_tensors(model).items():
        assert torch.equal(sam.state_dict()[name], tensor)


def test_seeded_model_is_the_same_for_the_same_seed() -> None:
    one, same, other = (seeded_model(seed, 64).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "metadata",
    [
        "[]",
        "{",
        "7",
        '{"image_size": "large"}',
        '{"thresholds": [1]}',
        '{"thresholds": {"pred_iou_thresh": "high"}}',
        '{"expected": {"embedding": 3}}',
    ],
)
def test_malformed_metadata_are_refused(metadata: str, tensors: StateDict, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors.torch.save(dict(tensors), {"everymask": metadata}))
    with pytest.raises(CheckpointError, match=r"x\.safetensors is truncated or no checkpoint"):
        load(path)
