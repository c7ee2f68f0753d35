"""Pixels as the CPU's convolutions and `bn_relu` take them fastest; `native.cpp` has the kernel."""

import torch
from torch import Tensor

from fastvitc.kernels.choice.dtypes import autocast, autocast_dtype
from fastvitc.kernels.conv_stem.ends import scaled_pixels


def channels_last_pixels(image: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """`scaled_pixels` in the dtype of autocast and channels-last, from uint8 in one pass."""
    if image.dtype == torch.uint8 and scale is not None and shift is not None:
        return _pixels(image, scale, shift, autocast_dtype(scale))
    return autocast(scaled_pixels(image, scale, shift)).contiguous(memory_format=torch.channels_last)


@torch.library.custom_op("fastvitc::native_pixels", mutates_args=())
def _pixels(image: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, -1).expand(1, len(scale), 1, -1)
    table = scaled_pixels(values, scale, shift).to(dtype).contiguous()
    out = _empty(image, dtype)
    torch.ops.fastvitc_native.look_up(image, table, out)
    return out


@_pixels.register_fake
def _(image, scale, shift, dtype):
    return _empty(image, dtype)


def _empty(image: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(image, dtype=dtype, memory_format=torch.channels_last)
