"""Pixels as the CPU's convolutions and `bn_relu` take them fastest; `native.cpp` has the kernels.

A pixel has 256 values, so a channel has 256 results, which a table holds. A mixed pixel is the sum of two entries.
"""

import torch
from torch import Tensor

from fastvitc.kernels.choice.dtypes import autocast, autocast_dtype
from fastvitc.kernels.conv_stem.arguments import Pixels
from fastvitc.kernels.conv_stem.pixels import normalized


def channels_last(image: Tensor, pixels: Pixels) -> Tensor:
    """`normalized` in the dtype of autocast and channels-last, from uint8 in one pass."""
    scale, shift, mix = pixels
    if image.dtype == torch.uint8 and scale is not None and shift is not None:
        return _pixels(image, scale, shift, mix, autocast_dtype(scale))
    return autocast(normalized(image, pixels)).contiguous(memory_format=torch.channels_last)


@torch.library.custom_op("fastvitc::native_pixels", mutates_args=())
def _pixels(image: Tensor, scale: Tensor, shift: Tensor, mix: Tensor | None, dtype: torch.dtype) -> Tensor:
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, -1).expand(1, len(scale), 1, -1)
    table = normalized(values, Pixels(scale, shift)).contiguous()
    out = _empty(image, dtype)
    if mix is None:
        torch.ops.fastvitc_native.look_up(image, table.to(dtype), out)
    else:
        table = table.float()
        tables = torch.stack([table, mix[0] * table, (1 - mix[0]) * table])
        torch.ops.fastvitc_native.look_up_mixed(image, tables, mix.contiguous(), out)
    return out


@_pixels.register_fake
def _(image, scale, shift, mix, dtype):
    return _empty(image, dtype)


def _empty(image: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(image, dtype=dtype, memory_format=torch.channels_last)
