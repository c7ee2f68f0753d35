"""What defines a stem besides its image: one value, which every backend of `conv_stem` gets."""

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


class Layers(NamedTuple):
    """Parameters, running statistics and geometry: n layers of convolution, BatchNorm and ReLU, a closing convolution.

    Attributes:
        conv_weights: n tensors (C_i, C_{i−1}, k, k), float.
        bn_weights, bn_biases, running_means, running_vars: n tensors (C_i,) each, float.
        proj_weight, proj_bias: (d, C_n, k, k) and (d,), float; the closing convolution.
        strides, paddings: n + 1 integers, one per convolution.
    """

    conv_weights: Sequence[Tensor]
    bn_weights: Sequence[Tensor]
    bn_biases: Sequence[Tensor]
    running_means: Sequence[Tensor]
    running_vars: Sequence[Tensor]
    proj_weight: Tensor
    proj_bias: Tensor
    strides: Sequence[int]
    paddings: Sequence[int]

    def convolutions(self) -> list[Tensor]:
        """The n + 1 convolution weights."""
        return [*self.conv_weights, self.proj_weight]

    def grids(self, height: int, width: int) -> list[tuple[int, int]]:
        """(height, width) of each convolution's output for an image of (height, width)."""
        sizes = []
        for weight, stride, padding in zip(self.convolutions(), self.strides, self.paddings, strict=True):
            height, width = output_size((height, width), weight, stride, padding)
            sizes.append((height, width))
        return sizes

    def computing_in(self, dtype: torch.dtype) -> "Layers":
        """The layers with their convolutions in a dtype; BatchNorm keeps its own."""
        return self._replace(
            conv_weights=[weight.to(dtype) for weight in self.conv_weights],
            proj_weight=self.proj_weight.to(dtype),
            proj_bias=self.proj_bias.to(dtype),
        )


class Pixels(NamedTuple):
    """What happens to an image before the first convolution: it is mixed, then normalised.

    y_0 = scale·mixed + shift with mixed = w·image + (1 − w)·(image rolled by one over the batch). Inside the box of
    rows [mix[1], mix[2]) and columns [mix[3], mix[4]) w is mix[0], outside it is 1. So one value stands for mixup
    (Zhang et al. 2018) and CutMix (Yun et al. 2019).

    Attributes:
        scale, shift: (C_0,) float, both or none.
        mix: (5,) float32, or None for an image as it is.
    """

    scale: Tensor | None = None
    shift: Tensor | None = None
    mix: Tensor | None = None


class Stem(NamedTuple):
    """What every backend gets beside the image, the class token and the positions.

    `training` tells whether the batch's own statistics normalise. `group` names the processes whose batches share them;
    "" is this process alone.
    """

    layers: Layers
    pixels: Pixels
    training: bool
    eps: float
    group: str

    def computing_in(self, dtype: torch.dtype) -> "Stem":
        """The stem with its convolutions in a dtype."""
        return self._replace(layers=self.layers.computing_in(dtype))

    def packed(
        self,
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[int], list[int], bool, float, str]:
        """(parameters, running statistics, pixels, strides, paddings, training, eps, group) in an operator's types."""
        convs, gammas, betas, means, variances, *proj, strides, paddings = self.layers
        parameters = [*convs, *gammas, *betas, *proj]
        running = [t.detach() for t in (*means, *variances)]
        pixels = [t for t in self.pixels if t is not None]
        return parameters, running, pixels, list(strides), list(paddings), self.training, self.eps, self.group

    @classmethod
    def unpacked(
        cls,
        parameters: Sequence[Tensor],
        running: Sequence[Tensor],
        pixels: Sequence[Tensor],
        strides: Sequence[int],
        paddings: Sequence[int],
        training: bool,
        eps: float,
        group: str,
    ) -> "Stem":
        """The stem of `packed`; `running` may be empty in the backward pass, which does not read it."""
        *lists, proj_weight, proj_bias = parameters
        n = len(strides) - 1
        layers = Layers(
            *(lists[:n], lists[n : 2 * n], lists[2 * n :]),
            *(running[:n], running[n:]),
            *(proj_weight, proj_bias, strides, paddings),
        )
        return cls(layers, Pixels(*pixels), training, eps, group)
