"""The BatchNorm + ReLU formulas (Ioffe & Szegedy 2015, algorithm 1), shared by `bn_relu` and `conv_stem`.

B batch, C channels, H W image, n = B·H·W values of a channel. Tensors are (B, C, H, W). Vectors of one value per
channel are in the accumulation dtype; those of one layer travel as the rows of one (4, C) tensor: mean, biased
variance, and the scale and shift with scale·x + shift = weight·(x − mean)/sqrt(variance + eps) + bias.
"""

import torch
from torch import Tensor

from fastvitc.kernels.choice.dtypes import accumulation_dtype

_OVER = (0, 2, 3)  # every dimension but the channels


def _per_channel(vector: Tensor) -> Tensor:
    return vector.view(1, -1, 1, 1)


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, two-pass."""
    x = x.to(accumulation_dtype(x.dtype))
    var, mean = torch.var_mean(x, dim=_OVER, correction=0)
    return mean, var


def scale_shift(mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The scale and the shift of the normalisation, in the accumulation dtype."""
    wide = accumulation_dtype(mean.dtype)
    mean, var, weight, bias = (vector.to(wide) for vector in (mean, var, weight, bias))
    scale = weight * torch.rsqrt(var + eps)
    return scale, bias - mean * scale


def layer_vectors(mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(4, C): mean, variance, scale, shift."""
    scale, shift = scale_shift(mean, var, weight, bias, eps)
    return torch.stack([mean.to(scale.dtype), var.to(scale.dtype), scale, shift])


def normalize_relu(x: Tensor, vectors: Tensor) -> Tensor:
    """relu(scale·x + shift) in the dtype of x."""
    _, _, scale, shift = vectors
    y = x.to(accumulation_dtype(x.dtype)) * _per_channel(scale) + _per_channel(shift)
    return y.relu().to(x.dtype)


def gradient_sums(dy: Tensor, x: Tensor, vectors: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(dy', dweight, dbias) with dy' = dy·[scale·x + shift > 0] and x̂ the normalised x: Σdy'·x̂ and Σdy'."""
    dtype = accumulation_dtype(x.dtype)
    mean, var, scale, shift = vectors
    wide = x.to(dtype)
    masked = dy.to(dtype) * (wide * _per_channel(scale) + _per_channel(shift) > 0)
    normal = (wide - _per_channel(mean)) * _per_channel(torch.rsqrt(var + eps))
    return masked, (masked * normal).sum(_OVER), masked.sum(_OVER)


def input_coefficients(vectors: Tensor, mean_dweight: Tensor, mean_dbias: Tensor, eps: float) -> Tensor:
    """(3, C): the A, B, C of dx = A·dy' + B·x + C.

    In training dx = scale·(dy' − dbias/n − x̂·dweight/n), over the n values that the statistics are of; pass the two
    quotients. Where the statistics are constants both are zero.
    """
    mean, var, scale, _ = vectors
    slope = -scale * torch.rsqrt(var + eps) * mean_dweight
    return torch.stack([scale, slope, -scale * mean_dbias - slope * mean])


def input_gradient(masked: Tensor, x: Tensor, coefficients: Tensor) -> Tensor:
    """dx = A·dy' + B·x + C in the dtype of x."""
    a, b, c = map(_per_channel, coefficients)
    return (a * masked + (b * x.to(masked.dtype) + c)).to(x.dtype)


def update_running(
    running_mean: Tensor, running_var: Tensor, vectors: Tensor, count: int, momentum: float
) -> None:
    """Move the running statistics in place towards those of `count` values, with the unbiased variance as PyTorch."""
    mean, var, _, _ = vectors
    running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    running_var.lerp_((var * (count / max(count - 1, 1))).to(running_var.dtype), momentum)
