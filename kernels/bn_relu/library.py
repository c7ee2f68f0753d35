"""BatchNorm + ReLU by PyTorch's own ops, which torch.compile fuses with their neighbours."""

import torch.nn.functional as F
from torch import Tensor

from fastvitc.kernels.bn_relu.arguments import Norm


def bn_relu(x: Tensor, norm: Norm, momentum: float) -> Tensor:
    """(B, C, H, W) → the same shape; in training the running statistics move by `momentum`."""
    *vectors, training, eps, _ = norm
    return F.relu(F.batch_norm(x, *vectors, training, momentum, eps))
