"""Bias and GELU in plain PyTorch: the oracle of every other backend. Any device, any floating dtype."""

import math

import torch
from torch import Tensor

from fastvitc.kernels.choice.dtypes import accumulation_dtype


def _argument(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """v = x + bias and Φ(v), in the accumulation dtype."""
    v = x.to(accumulation_dtype(x.dtype)) + bias
    return v, torch.special.ndtr(v)


def forward(x: Tensor, bias: Tensor) -> Tensor:
    v, cdf = _argument(x, bias)
    return (v * cdf).to(x.dtype)


def backward(dy: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """(dx, dbias)."""
    v, cdf = _argument(x, bias)
    dx = dy.to(v.dtype) * (cdf + v * torch.exp(-0.5 * v * v) / math.sqrt(2 * math.pi))
    return dx.to(x.dtype), dx.sum(tuple(range(dx.dim() - 1))).to(bias.dtype)
