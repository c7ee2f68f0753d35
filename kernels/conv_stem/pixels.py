"""From the pixels to the first convolution's input, in PyTorch: mixing, then normalisation.

B batch, C channels, H W image. A mix is five float32 numbers: a weight w inside a box, and the box's top, bottom, left
and right in pixels. The normalisation is affine, so it gives the same before the mixing as after it.
"""

import torch
from torch import Tensor

from fastvitc.kernels.choice.dtypes import accumulation_dtype
from fastvitc.kernels.conv_stem.arguments import Pixels


def mixed(image: Tensor, mix: Tensor) -> Tensor:
    """(B, C, H, W), (5,) → w·image + (1 − w)·(image rolled by one over the batch); w is 1 outside the box.

    The result has the dtype of a floating-point image, and that of `mix` for uint8.
    """
    dtype = accumulation_dtype(image.dtype) if image.is_floating_point() else mix.dtype
    inside, top, bottom, left, right = mix.to(dtype).unbind()
    rows = torch.arange(image.shape[2], device=image.device).view(-1, 1)
    columns = torch.arange(image.shape[3], device=image.device)
    box = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    weight = torch.where(box, inside, 1.0)
    result = image * weight + image.roll(1, 0) * (1.0 - weight)
    return result.to(image.dtype) if image.is_floating_point() else result


def normalized(image: Tensor, pixels: Pixels) -> Tensor:
    """y_0 = scale·mixed(image) + shift (B, C, H, W); of uint8 in the dtype of the vectors."""
    scale, shift, mix = pixels
    y = image
    if mix is not None:
        y = mixed(image, mix if scale is None else mix.to(accumulation_dtype(scale.dtype)))
    if scale is not None and shift is not None:
        y = y * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
    return y if image.is_floating_point() or scale is None else y.to(scale.dtype)
