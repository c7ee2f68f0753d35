"""Attention by xFormers' memory-efficient kernels, which read the packed projection in place.

B batch, T tokens, N heads, D head dim. Not run on a GPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from xformers.ops import fmha

from fastvitc.kernels.choice.backends import BackendUnavailable


def forward(qkv: Tensor, num_heads: int, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = _unpack(qkv, num_heads)
    with _refusals():
        out, lse = fmha.memory_efficient_attention_forward_requires_grad(q, k, v, scale=scale)
    # Some of its kernels pad the tokens of the log-sum-exp to a multiple of 32.
    return out.contiguous().flatten(2), lse[..., : qkv.shape[1]].float().contiguous()


def backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, num_heads: int, scale: float) -> Tensor:
    dout, out = (packed.contiguous().unflatten(2, (num_heads, -1)) for packed in (dout, out))
    with _refusals():
        grads = fmha.memory_efficient_attention_backward(
            dout, out, lse, *_unpack(qkv, num_heads), scale=scale
        )
    return _packed(*grads)


def _unpack(qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """(B, T, 3·N·D) → three views (B, T, N, D)."""
    return qkv.unflatten(2, (3, num_heads, -1)).unbind(2)


def _packed(*grads: Tensor) -> Tensor:
    """Three (B, T, N, D) → (B, T, 3·N·D), without a copy where they are views of one such tensor.

    xFormers makes them so for queries, keys and values that are.
    """
    first = grads[0]
    batch, tokens, heads, dim = first.shape
    part = heads * dim
    memory, start = first.untyped_storage().data_ptr(), first.storage_offset()
    if all(
        grad.untyped_storage().data_ptr() == memory
        and grad.storage_offset() == start + i * part
        and grad.stride() == (3 * part * tokens, 3 * part, dim, 1)
        for i, grad in enumerate(grads)
    ):
        return first.as_strided((batch, tokens, 3 * part), (3 * part * tokens, 3 * part, 1))
    return torch.stack(grads, dim=2).flatten(2)


@contextmanager
def _refusals() -> Iterator[None]:
    """xFormers' report that no kernel of its takes the input, as the error of this library."""
    try:
        yield
    except NotImplementedError as error:
        reasons = " ".join(str(error).split())
        raise BackendUnavailable(
            f"attention: xFormers has no kernel for this input: {reasons}; use the backend torch"
        ) from error
