"""Attention on the CPU; `native.cpp` has the kernels. B batch, T tokens, N heads, D head dim."""

import torch
from torch import Tensor


def forward(qkv: Tensor, num_heads: int, scale: float) -> tuple[Tensor, Tensor]:
    """(out (B, T, N·D), lse (B, N, T) float32)."""
    batch, tokens, width = qkv.shape
    out = qkv.new_empty(batch, tokens, width // 3)
    lse = qkv.new_empty(batch, num_heads, tokens, dtype=torch.float32)
    torch.ops.fastvitc_native.attention_forward(qkv, num_heads, scale, out, lse)
    return out, lse


def backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, num_heads: int, scale: float) -> Tensor:
    """dqkv (B, T, 3·N·D)."""
    dqkv = torch.empty_like(qkv)
    torch.ops.fastvitc_native.attention_backward(
        dout.contiguous(), qkv, out.contiguous(), lse, num_heads, scale, dqkv
    )
    return dqkv
