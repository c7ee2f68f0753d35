"""Bias and GELU on the CPU; `native.cpp` has the kernels."""

import torch
from torch import Tensor


def forward(x: Tensor, bias: Tensor) -> Tensor:
    y = torch.empty_like(x)
    torch.ops.fastvitc_native.bias_gelu_forward(x, bias.float().contiguous(), y)
    return y


def backward(dy: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """(dx, dbias)."""
    dx, dbias = torch.empty_like(x), bias.new_empty(bias.shape, dtype=torch.float32)
    torch.ops.fastvitc_native.bias_gelu_backward(dy, x, bias.float().contiguous(), dx, dbias)
    return dx, dbias.to(bias.dtype)
