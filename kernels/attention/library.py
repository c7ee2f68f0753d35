"""Attention by PyTorch's scaled_dot_product_attention; composed of PyTorch ops, so torch.compile sees into it."""

import torch.nn.functional as F
from torch import Tensor


def attention(qkv: Tensor, num_heads: int, scale: float) -> Tensor:
    batch, tokens, width = qkv.shape
    heads = qkv.reshape(batch, tokens, 3, num_heads, width // (3 * num_heads))
    q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
    out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return out.transpose(1, 2).reshape(batch, tokens, width // 3)
