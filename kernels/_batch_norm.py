"""The BatchNorm + ReLU formulas (Ioffe & Szegedy 2015, algorithm 1), shared by `bn_relu` and `conv_stem`.

B batch, C channels, H W image. Tensors are (B, C, H, W); per-channel vectors are (C,) in the accumulation dtype.
"""

import torch
from torch import Tensor

from fastvitc.kernels._dtype import accumulation_dtype

_OVER = (0, 2, 3)  # every dimension but the channels


def _per_channel(vector: Tensor) -> Tensor:
    return vector.view(1, -1, 1, 1)


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, two-pass."""
    x = x.to(accumulation_dtype(x.dtype))
    var, mean = torch.var_mean(x, dim=_OVER, correction=0)
    return mean, var


def scale_shift(mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(a, b) such that a·x + b = weight·(x − mean)/sqrt(var + eps) + bias."""
    a = weight * torch.rsqrt(var + eps)
    return a, bias - mean * a


def normalize_relu(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """relu(a·x + b) in the dtype of x."""
    a, b = scale_shift(mean, var, weight, bias, eps)
    y = x.to(accumulation_dtype(x.dtype)) * _per_channel(a) + _per_channel(b)
    return y.relu().to(x.dtype)


def normalize_relu_backward(
    dy: Tensor, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias) from the gradient of `normalize_relu`.

    With dy' = dy·[a·x + b > 0] and x̂ = (x − mean)·rstd: dbias = Σdy', dweight = Σdy'·x̂, and
    dx = a·(dy' − dbias/n − x̂·dweight/n) in training; the two means vanish where the statistics are constants.
    """
    dtype = accumulation_dtype(x.dtype)
    a, b = scale_shift(mean, var, weight, bias, eps)
    wide = x.to(dtype)
    masked = dy.to(dtype) * (wide * _per_channel(a) + _per_channel(b) > 0)
    normal = (wide - _per_channel(mean)) * _per_channel(torch.rsqrt(var + eps))
    dbias = masked.sum(_OVER)
    dweight = (masked * normal).sum(_OVER)
    dx = masked
    if training:
        count = x.numel() // x.shape[1]
        dx = masked - _per_channel(dbias / count) - normal * _per_channel(dweight / count)
    return (dx * _per_channel(a)).to(x.dtype), dweight, dbias


def update_running(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, count: int, momentum: float
) -> None:
    """Move the running statistics in place towards a batch's, with the unbiased variance as PyTorch does."""
    running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    running_var.lerp_((var * (count / max(count - 1, 1))).to(running_var.dtype), momentum)
