"""The stem by PyTorch's convolutions (cuDNN, oneDNN), BatchNorm folded into them in evaluation."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from fastvitc.kernels.batch_norm.formulas import scale_shift
from fastvitc.kernels.bn_relu import bn_relu
from fastvitc.kernels.choice.dtypes import autocast
from fastvitc.kernels.conv_stem.arguments import Pixels, Stem
from fastvitc.kernels.conv_stem.pixels import normalized
from fastvitc.kernels.conv_stem.tokens import assemble


def conv_stem(
    image: Tensor,
    stem: Stem,
    class_token: Tensor | None,
    pos_embed: Tensor | None,
    momentum: float,
    *,
    norms: str = "torch",
    first_input: Callable[[Tensor, Pixels], Tensor] = normalized,
) -> Tensor:
    """Tokens; `norms` is the backend of `bn_relu` in training, `first_input` makes what the first convolution reads."""
    layers = stem.layers

    def convolved(y: Tensor, weight: Tensor, bias: Tensor | None, layer: int) -> Tensor:
        bias = None if bias is None else autocast(bias)
        return F.conv2d(y, autocast(weight), bias, layers.strides[layer], layers.paddings[layer])

    y = autocast(first_input(image, stem.pixels))
    for i, weight in enumerate(layers.conv_weights):
        statistics = layers.running_means[i], layers.running_vars[i]
        affine = layers.bn_weights[i], layers.bn_biases[i]
        if stem.training:
            z = convolved(y, weight, None, i)
            y = bn_relu(z, *statistics, *affine, True, momentum, stem.eps, backend=norms)
        else:
            scale, shift = scale_shift(*statistics, *affine, stem.eps)
            folded = (weight * scale.view(-1, 1, 1, 1)).to(y.dtype)
            y = F.relu_(convolved(y, folded, shift.to(y.dtype), i))
    return assemble(convolved(y, layers.proj_weight, layers.proj_bias, -1), class_token, pos_embed)
