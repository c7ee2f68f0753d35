"""Checks of inputs that every op shares: one clear error before anything runs."""

import torch
from torch import Tensor


def check_triton(op: str, dtype: torch.dtype) -> None:
    """Raise TypeError for a dtype that the Triton kernels do not compute in."""
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(
            f"{op}: the triton backend takes float32, float16 or bfloat16, got {dtype}; use the backend reference"
        )


def check_floating(op: str, **tensors: Tensor) -> None:
    """Raise TypeError for the first tensor that is not floating point."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{op}: {name} must be a floating-point tensor, got {tensor.dtype}")


def check_device(op: str, name: str, first: Tensor, **others: Tensor | None) -> None:
    """Raise ValueError for the first tensor that is not on the device of `first`, which the caller knows as `name`."""
    for other, tensor in others.items():
        if tensor is not None and tensor.device != first.device:
            raise ValueError(
                f"{op}: {other} is on {tensor.device} and {name} on {first.device}; move them to one device"
            )
