"""Matrix products, by the faster of the two libraries that PyTorch has for them on a CPU.

PyTorch gives float32 products to MKL, which on an AMD processor leaves half of AVX-512 unused; oneDNN, which it
gives bfloat16 ones, does not. `torch.compile` reaches oneDNN through the operator that is used here.
"""

from typing import Any, Final

import torch


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


_LINEAR: Final = _onednn()


def products(left_Nij: torch.Tensor, right_Njk: torch.Tensor) -> torch.Tensor:
    """N products of matrices i x j and j x k: N x i x k. As `torch.bmm`, but for rounding; not differentiable.

    Args:
        left_Nij: float32 or bfloat16, on any device.
        right_Njk: The same.
    """
    if _LINEAR is None or left_Nij.device.type != "cpu" or left_Nij.dtype != torch.float32 or not len(left_Nij):
        return torch.bmm(left_Nij, right_Njk)
    if not right_Njk.mT.is_contiguous():
        right_Njk = right_Njk.contiguous()  # of a part of a larger matrix oneDNN makes a slow plain loop
    pairs = zip(left_Nij.contiguous(), right_Njk.mT, strict=True)
    made = [_LINEAR(left_ij, right_kj, None, "none", [], "") for left_ij, right_kj in pairs]
    return made[0][None] if len(made) == 1 else torch.stack(made)
