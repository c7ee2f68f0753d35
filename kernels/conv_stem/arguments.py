"""What defines a stem besides its image: handed as one value to every backend of `conv_stem`."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def output_size(size: Sequence[int], weight: Tensor, stride: int, padding: int) -> tuple[int, int]:
    """(height, width) of a convolution's output for an input of `size` and a weight (N, C, KH, KW)."""
    height, width = (
        (side + 2 * padding - kernel) // stride + 1
        for side, kernel in zip(size, weight.shape[2:], strict=True)
    )
    return height, width


class Stem(NamedTuple):
    """Parameters and geometry. Lists run over the n layers, `strides` and `paddings` over the n + 1 convolutions.

    `pixel_scale` and `pixel_shift` (C_0,) are None or make y_0 = pixel_scale·image + pixel_shift. `group` names the
    processes whose batches share the training statistics, "" is this process alone.
    """

    conv_weights: Sequence[Tensor]
    bn_weights: Sequence[Tensor]
    bn_biases: Sequence[Tensor]
    proj_weight: Tensor
    proj_bias: Tensor
    pixel_scale: Tensor | None
    pixel_shift: Tensor | None
    strides: Sequence[int]
    paddings: Sequence[int]
    eps: float
    group: str

    def grids(self, height: int, width: int) -> list[tuple[int, int]]:
        """(height, width) of each convolution's output for an image of (height, width)."""
        sizes = []
        weights = [*self.conv_weights, self.proj_weight]
        for weight, stride, padding in zip(weights, self.strides, self.paddings, strict=True):
            height, width = output_size((height, width), weight, stride, padding)
            sizes.append((height, width))
        return sizes

    def computing_in(self, dtype: torch.dtype) -> "Stem":
        """The stem with its convolutions in a dtype; BatchNorm keeps its own."""
        return self._replace(
            conv_weights=[weight.to(dtype) for weight in self.conv_weights],
            proj_weight=self.proj_weight.to(dtype),
            proj_bias=self.proj_bias.to(dtype),
        )

    def packed(self) -> tuple[list[Tensor], list[Tensor], list[int], list[int], float, str]:
        """(parameters, pixel vectors, strides, paddings, eps, group): what `unpacked` takes, in an operator's types."""
        parameters = [*self.conv_weights, *self.bn_weights, *self.bn_biases, self.proj_weight, self.proj_bias]
        pixels = [v for v in (self.pixel_scale, self.pixel_shift) if v is not None]
        return parameters, pixels, list(self.strides), list(self.paddings), self.eps, self.group

    @classmethod
    def unpacked(
        cls,
        parameters: Sequence[Tensor],
        pixels: Sequence[Tensor],
        strides: Sequence[int],
        paddings: Sequence[int],
        eps: float,
        group: str,
    ) -> "Stem":
        """The stem of `packed`."""
        *layers, proj_weight, proj_bias = parameters
        n = len(layers) // 3
        lists = layers[:n], layers[n : 2 * n], layers[2 * n :]
        scale, shift = pixels or (None, None)
        return cls(*lists, proj_weight, proj_bias, scale, shift, strides, paddings, eps, group)
