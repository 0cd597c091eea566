"""Matrix products, by the faster of the two libraries that PyTorch has for them on a CPU.

PyTorch gives float32 products to MKL. On Intel's processors that is the faster one; on others it leaves half of
AVX-512 unused, and oneDNN, which PyTorch gives bfloat16 products, does not. `torch.compile` reaches oneDNN through
the operator that is used here.
"""

from functools import cache
from pathlib import Path
from typing import Any, Final

import torch
from torch.nn import functional as F


def _is_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:  # no Linux
        return False


def _onednn() -> Any:
    """x, w -> x wᵀ in float32; None where this build of PyTorch lacks it."""
    try:
        linear = torch.ops.mkldnn._linear_pointwise.default
        x, w = torch.eye(2, 3), torch.ones(4, 3)
        with torch.no_grad():
            works = torch.equal(linear(x, w, None, "none", [], ""), x @ w.T)
    except (AttributeError, RuntimeError, TypeError):
        return None
    return linear if works else None


_ONEDNN: Final = _onednn()
_LINEAR: Final = None if _is_intel() else _ONEDNN


def products(
    left_Nij: torch.Tensor, right_Njk: torch.Tensor, onto_Nik: torch.Tensor | None = None
) -> torch.Tensor:
    """N products of matrices i x j and j x k: N x i x k. As `torch.bmm`, but for rounding; not differentiable.

    Args:
        left_Nij: float32 or bfloat16, on any device.
        right_Njk: The same.
        onto_Nik: Is added to, in place, and returned.
    """
    if _LINEAR is None or left_Nij.device.type != "cpu" or left_Nij.dtype != torch.float32 or not len(left_Nij):
        return torch.bmm(left_Nij, right_Njk) if onto_Nik is None else onto_Nik.baddbmm_(left_Nij, right_Njk)
    if not right_Njk.mT.is_contiguous():
        right_Njk = right_Njk.contiguous()  # of a part of a larger matrix oneDNN makes a slow plain loop
    pairs = zip(left_Nij.contiguous(), right_Njk.mT, strict=True)
    made = [_LINEAR(left_ij, right_kj, None, "none", [], "") for left_ij, right_kj in pairs]
    product_Nik = made[0][None] if len(made) == 1 else torch.stack(made)
    return product_Nik if onto_Nik is None else onto_Nik.add_(product_Nik)


def linear(x: torch.Tensor, weight_oi: torch.Tensor, bias_o: torch.Tensor | None) -> torch.Tensor:
    """Rows ... x i to ... x o. As `torch.nn.functional.linear`, but for rounding; not differentiable."""
    exact = x.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type)
    if _LINEAR is None or x.device.type != "cpu" or not exact or not x.numel():
        return F.linear(x, weight_oi, bias_o)
    made: torch.Tensor = _LINEAR(x, weight_oi, bias_o, "none", [], "")
    return made


def gelu_of_linear(x_Li: torch.Tensor, weight_oi: torch.Tensor, bias_o: torch.Tensor) -> torch.Tensor:
    """Rows L x i to L x o: GELU of a linear map, on a CPU in one pass over what it makes; not differentiable."""
    known = x_Li.dtype == torch.float32 or (x_Li.dtype == torch.bfloat16 and _onednn_knows_bfloat16())
    if _ONEDNN is None or x_Li.device.type != "cpu" or not known or not len(x_Li):
        return gelu_(F.linear(x_Li, weight_oi, bias_o))
    made: torch.Tensor = _ONEDNN(x_Li, weight_oi, bias_o, "gelu", [], "none")
    return made


@cache
def _onednn_knows_bfloat16() -> bool:
    """Not on a CPU without AVX-512."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def gelu_(x: torch.Tensor) -> torch.Tensor:
    """In place, which `torch.nn.functional` does not offer."""
    made: torch.Tensor = torch.ops.aten.gelu_(x)
    return made
