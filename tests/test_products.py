"""Matrix products."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from pipeline.model import products as module
from pipeline.model.products import gelu_of_linear, products


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_products_are_those_of_bmm(count: int, onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LINEAR", module._onednn() if onednn else None)
    random = torch.Generator().manual_seed(0)
    left = torch.randn(count, 56, 114, generator=random)
    right = torch.randn(count, 114, 500, generator=random)
    wide = torch.randn(count, 114, 900, generator=random)
    with torch.inference_mode():
        for a, b in (
            (left, right),
            (left, wide[:, :, 100:200]),
            (right.mT, left.mT),
            (left[:, :, 3:50], right[:, 3:50]),
            (left[:1].expand(count, -1, -1), right),
        ):
            torch.testing.assert_close(products(a, b), torch.bmm(a, b), rtol=1e-5, atol=1e-4)
            onto = torch.randn(count, a.shape[1], b.shape[2], generator=random)
            expected = torch.baddbmm(onto, a, b)
            assert products(a, b, onto) is onto
            torch.testing.assert_close(onto, expected, rtol=1e-5, atol=1e-4)
    half = left.bfloat16(), right.bfloat16()
    assert torch.equal(products(*half), torch.bmm(*half))


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("count", [0, 300])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_gelu_of_linear_is_that_of_float64(
    count: int, dtype: torch.dtype, tolerance: float, onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ONEDNN", module._onednn() if onednn else None)
    random = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=random).to(dtype) for shape in ((count, 64), (64, 64), (64,)))
    with torch.inference_mode():
        made = gelu_of_linear(x, weight, bias)
    expected = F.gelu(F.linear(x.double(), weight.double(), bias.double()))
    assert made.dtype == dtype
    torch.testing.assert_close(made.double(), expected, rtol=tolerance, atol=tolerance)


def test_bfloat16_is_not_onednns_on_a_cpu_for_which_it_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object) -> torch.Tensor:
        raise RuntimeError("could not create a primitive descriptor")

    monkeypatch.setattr(module, "_ONEDNN", refuses)
    monkeypatch.setattr(module, "_onednn_knows_bfloat16", lambda: False)
    x, weight, bias = (torch.randn(shape).bfloat16() for shape in ((3, 8), (4, 8), (4,)))
    assert torch.equal(gelu_of_linear(x, weight, bias), F.gelu(F.linear(x, weight, bias)))
    with pytest.raises(RuntimeError):
        gelu_of_linear(x.float(), weight.float(), bias.float())


def test_without_onednn_they_are_pytorchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LINEAR", None)
    left, right = torch.randn(2, 5, 7), torch.randn(2, 7, 3)
    assert torch.equal(products(left, right), torch.bmm(left, right))


def test_onednn_is_found_or_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the operator is not there, or is another one, none is found, and no error raised."""
    assert (module._onednn() is not None) == torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", None)
    assert module._onednn() is None


def test_intels_processors_are_told_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for vendor in ("GenuineIntel", "AuthenticAMD"):
        monkeypatch.setattr(Path, "read_text", lambda _, vendor=vendor: f"vendor_id\t: {vendor}\n")
        assert module._is_intel() == (vendor == "GenuineIntel")

    def missing(_: Path) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert not module._is_intel()
