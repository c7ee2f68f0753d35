"""Residual sum and LayerNorm in plain PyTorch: the oracle of every other backend. Any device, any floating dtype."""

import torch
from torch import Tensor

from fastvitc.kernels.choice.dtypes import accumulation_dtype


def forward(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(total, the normalised one in `dtype`, mean and 1/sqrt(var + eps) of each row)."""
    total = x if branch is None else (x.to(accumulation_dtype(x.dtype)) + branch).to(x.dtype)
    wide = total.to(accumulation_dtype(x.dtype))
    mean = wide.mean(-1, keepdim=True)
    var = (wide - mean).square().mean(-1, keepdim=True)
    moments = torch.cat([mean, torch.rsqrt(var + eps)], -1)
    y = (_normal(total, moments) * weight + bias).to(dtype)
    return x.new_empty(0) if branch is None else total, y, moments


def backward(
    dtotal: Tensor | None,
    dy: Tensor,
    total: Tensor,
    moments: Tensor,
    weight: Tensor,
    bias: Tensor,
    branch_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dbranch where its dtype is another, else empty, dweight, dbias)."""
    normal = _normal(total, moments)
    dy = dy.to(normal.dtype)
    g = dy * weight
    dx = moments[..., 1:] * (g - g.mean(-1, keepdim=True) - normal * (g * normal).mean(-1, keepdim=True))
    if dtotal is not None:
        dx = dx + dtotal
    rows = tuple(range(dy.dim() - 1))
    dweight, dbias = (dy * normal).sum(rows).to(weight.dtype), dy.sum(rows).to(bias.dtype)
    dbranch = dx.new_empty(0, dtype=branch_dtype) if branch_dtype == total.dtype else dx.to(branch_dtype)
    return dx.to(total.dtype), dbranch, dweight, dbias


def _normal(total: Tensor, moments: Tensor) -> Tensor:
    return (total.to(moments.dtype) - moments[..., :1]) * moments[..., 1:]
