"""BatchNorm + ReLU in plain PyTorch: the oracle of every other backend. Any device, any floating dtype."""

import torch
from torch import Tensor

from fastvitc.kernels.batch_norm.formulas import (
    gradient_sums,
    input_coefficients,
    input_gradient,
    layer_vectors,
    normalize_relu,
    statistics,
)
from fastvitc.kernels.batch_norm.group import mean_over_group, merged_statistics
from fastvitc.kernels.bn_relu.arguments import Norm


def forward(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """(y, the layer's vectors)."""
    if norm.training:
        mean, var = merged_statistics(*statistics(x), x.numel() // x.shape[1], norm.group)
    else:
        mean, var = norm.running_mean, norm.running_var
    vectors = layer_vectors(mean, var, norm.weight, norm.bias, norm.eps)
    return normalize_relu(x, vectors), vectors


def backward(
    dy: Tensor, x: Tensor, vectors: Tensor, training: bool, eps: float, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias)."""
    masked, dweight, dbias = gradient_sums(dy, x, vectors, eps)
    sums = torch.stack([dweight, dbias])
    means = mean_over_group(sums / (x.numel() // x.shape[1]), group) if training else torch.zeros_like(sums)
    return input_gradient(masked, x, input_coefficients(vectors, *means, eps)), dweight, dbias
