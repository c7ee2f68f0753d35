"""Attention in plain PyTorch: the oracle of every other backend. Any device, any floating dtype.

B batch, T tokens, N heads, D head dim.
"""

import torch
from torch import Tensor

from fastvitc.kernels.choice.dtypes import accumulation_dtype


def _unpack(packed: Tensor, parts: int, num_heads: int) -> tuple[Tensor, ...]:
    """(B, T, parts·N·D) → `parts` tensors (B, N, T, D) in the accumulation dtype."""
    batch, tokens, width = packed.shape
    heads = packed.view(batch, tokens, parts, num_heads, width // (parts * num_heads))
    return heads.permute(2, 0, 3, 1, 4).to(accumulation_dtype(packed.dtype)).unbind(0)


def _pack(*heads: Tensor) -> Tensor:
    """`parts` tensors (B, N, T, D) → (B, T, parts·N·D)."""
    return torch.stack(heads).permute(1, 3, 0, 2, 4).flatten(2)


def forward(qkv: Tensor, num_heads: int, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = _unpack(qkv, 3, num_heads)
    scores = scale * q @ k.mT
    lse = scores.logsumexp(-1)
    out = (scores - lse.unsqueeze(-1)).exp() @ v
    return _pack(out).to(qkv.dtype), lse


def backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, num_heads: int, scale: float) -> Tensor:
    q, k, v = _unpack(qkv, 3, num_heads)
    (do,) = _unpack(dout.contiguous(), 1, num_heads)
    (o,) = _unpack(out, 1, num_heads)
    p = (scale * q @ k.mT - lse.unsqueeze(-1)).exp()
    ds = scale * p * (do @ v.mT - (do * o).sum(-1, keepdim=True))
    return _pack(ds @ k, ds.mT @ q, p.mT @ do).to(qkv.dtype)
