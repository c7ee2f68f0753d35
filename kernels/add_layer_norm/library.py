"""Residual sum and LayerNorm by PyTorch's own ops, which torch.compile fuses."""

import torch
import torch.nn.functional as F
from torch import Tensor


def add_layer_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    total = x if branch is None else x + branch
    wide = torch.promote_types(total.dtype, weight.dtype)
    y = F.layer_norm(total.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps)
    return total, y.to(dtype)
