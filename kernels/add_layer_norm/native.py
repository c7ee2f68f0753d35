"""Residual sum and LayerNorm on the CPU; `native.cpp` has the kernels."""

import torch
from torch import Tensor


def forward(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(total, the normalised one in `dtype`, mean and 1/sqrt(var + eps) of each row)."""
    total = None if branch is None else torch.empty_like(x)
    y = torch.empty_like(x, dtype=dtype)
    moments = x.new_empty(*x.shape[:-1], 2, dtype=torch.float32)
    torch.ops.fastvitc_native.add_layer_norm_forward(
        x, branch, weight.float().contiguous(), bias.float().contiguous(), eps, total, y, moments
    )
    return x.new_empty(0) if total is None else total, y, moments


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
    dx = torch.empty_like(total)
    dbranch = torch.empty_like(total, dtype=branch_dtype) if branch_dtype != total.dtype else None
    vectors = weight.new_empty(2, len(weight), dtype=torch.float32)
    torch.ops.fastvitc_native.add_layer_norm_backward(
        dtotal, dy, total, moments, weight.float().contiguous(), dx, dbranch, vectors
    )
    dweight, dbias = vectors.to(weight.dtype).unbind()
    return (
        dx,
        total.new_empty(0, dtype=branch_dtype) if dbranch is None else dbranch,
        dweight.clone(),
        dbias.clone(),
    )
