"""Checks of inputs that every op shares: one clear error before anything runs."""

import torch
from torch import Tensor

#: Backends that are this library's own kernels, and the dtypes that those compute in.
_KERNELS = ("triton", "native")
_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def takes(backend: str, dtype: torch.dtype | None) -> bool:
    """Whether a backend computes in a dtype; True where the dtype is not known yet (None)."""
    return backend not in _KERNELS or dtype is None or dtype in _KERNEL_DTYPES


def check_dtype(op: str, backend: str, dtype: torch.dtype) -> None:
    """Raise TypeError for a dtype that the backend does not compute in."""
    if not takes(backend, dtype):
        raise TypeError(
            f"{op}: the {backend} backend takes float32, float16 or bfloat16, got {dtype}; use the backend reference"
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
