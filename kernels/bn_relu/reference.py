"""BatchNorm + ReLU in plain PyTorch: the oracle of every other backend. Any device, any floating dtype."""

from torch import Tensor

from fastvitc.kernels._batch_norm import normalize_relu, normalize_relu_backward, statistics


def forward(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor,
    bias: Tensor,
    training: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    mean, var = statistics(x) if training else (running_mean.clone(), running_var.clone())
    return normalize_relu(x, mean, var, weight, bias, eps), mean, var


backward = normalize_relu_backward
