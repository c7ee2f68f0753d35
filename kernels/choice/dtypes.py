"""Dtype rules that every op shares."""

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for float32 and narrower, float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


@torch.compiler.assume_constant_result
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """The active autocast dtype of the tensor's device, as PyTorch's own convolutions choose theirs; else its own."""
    kind = tensor.device.type
    if tensor.dtype == torch.float64 or not _has_autocast(kind):
        return tensor.dtype
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def autocast(tensor: Tensor) -> Tensor:
    """The tensor in its `autocast_dtype`."""
    return tensor.to(autocast_dtype(tensor))
