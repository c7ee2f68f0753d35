"""Attention by PyTorch's scaled_dot_product_attention; composed of PyTorch ops, so torch.compile sees into it."""

from contextlib import nullcontext
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import (
    SDPAParams,
    can_use_cudnn_attention,
    can_use_efficient_attention,
    can_use_flash_attention,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

#: Backend → the one kernel that may run, None for PyTorch's choice among them.
KERNELS = {
    "torch": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
_CAN_USE = {
    "flash": can_use_flash_attention,
    "efficient": can_use_efficient_attention,
    "cudnn": can_use_cudnn_attention,
}


def attention(qkv: Tensor, num_heads: int, scale: float, backend: str) -> Tensor:
    batch, tokens, width = qkv.shape
    heads = qkv.contiguous().view(batch, tokens, 3, num_heads, width // (3 * num_heads))
    q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
    kernel = KERNELS[backend]
    with nullcontext() if kernel is None else sdpa_kernel(kernel):
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return out.transpose(1, 2).reshape(batch, tokens, width // 3)


def no_flash(device_type: str) -> str | None:
    """Why PyTorch's flash attention cannot run on a device type, None when it can."""
    return None if device_type in ("cpu", "cuda") else "PyTorch's flash attention runs on cpu and cuda"


def no_efficient(device_type: str) -> str | None:
    """Why PyTorch's memory-efficient attention cannot run on a device type, None when it can."""
    return None if device_type == "cuda" else "PyTorch's memory-efficient attention needs a GPU"


def no_cudnn(device_type: str) -> str | None:
    """Why cuDNN's attention cannot run on a device type, None when it can."""
    if device_type != "cuda" or torch.version.hip is not None:
        return "cuDNN's attention needs an NVIDIA GPU"
    return None if torch.backends.cudnn.is_available() else "this build of PyTorch has no cuDNN"


def unfit(backend: str, device_type: str, dtype: torch.dtype, head_dim: int, gradient: bool) -> str | None:
    """Why the one kernel of a backend cannot take such an input on the current device, None when it can."""
    if device_type != "cuda" or _fits(backend, torch.cuda.current_device(), dtype, head_dim, gradient):
        return None
    purpose = "forward and backward" if gradient else "forward"
    return (
        f"PyTorch's {backend} attention does not take {dtype} with heads of {head_dim} for {purpose} "
        f"on {torch.cuda.get_device_name()}"
    )


@cache
def _fits(backend: str, device: int, dtype: torch.dtype, head_dim: int, gradient: bool) -> bool:
    # The batch, the number of heads and the number of tokens (but for a single one) change nothing.
    x = torch.empty(1, 1, 64, head_dim, device=f"cuda:{device}", dtype=dtype, requires_grad=gradient)
    with sdpa_kernel(KERNELS[backend]):
        return _CAN_USE[backend](SDPAParams(x, x, x, None, 0.0, False, False), False)
