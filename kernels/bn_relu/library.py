"""BatchNorm + ReLU by PyTorch's own ops, which torch.compile fuses with their neighbours."""

import torch.nn.functional as F
from torch import Tensor


def bn_relu(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor,
    bias: Tensor,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    return F.relu(F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps))
