"""The stem by PyTorch's convolutions (cuDNN, oneDNN), BatchNorm folded into them in evaluation."""

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor

from fastvitc.kernels.batch_norm.formulas import scale_shift
from fastvitc.kernels.choice.dtypes import autocast
from fastvitc.kernels.conv_stem.arguments import Stem
from fastvitc.kernels.conv_stem.ends import assemble, scaled_pixels


def batch_norm_relu(
    z: Tensor,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor,
    beta: Tensor,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """BatchNorm and ReLU, as PyTorch's own ops."""
    return F.relu(F.batch_norm(z, mean, var, gamma, beta, training, momentum, eps))


def conv_stem(
    image: Tensor,
    stem: Stem,
    running_means: Sequence[Tensor],
    running_vars: Sequence[Tensor],
    class_token: Tensor | None,
    pos_embed: Tensor | None,
    training: bool,
    momentum: float,
    normalize: Callable[..., Tensor] = batch_norm_relu,
    pixels: Callable[..., Tensor] = scaled_pixels,
) -> Tensor:
    """Tokens; `pixels` makes the first input, in training `normalize` is what follows each convolution."""
    y = autocast(pixels(image, stem.pixel_scale, stem.pixel_shift))
    layers = zip(
        stem.conv_weights,
        stem.bn_weights,
        stem.bn_biases,
        running_means,
        running_vars,
        stem.strides,
        stem.paddings,
        strict=False,
    )
    for weight, gamma, beta, mean, var, stride, padding in layers:
        if training:
            z = F.conv2d(y, autocast(weight), None, stride, padding)
            y = normalize(z, mean, var, gamma, beta, True, momentum, stem.eps)
        else:
            a, b = scale_shift(mean, var, gamma, beta, stem.eps)
            folded = autocast((weight * a.view(-1, 1, 1, 1)).to(y.dtype))
            y = F.relu_(F.conv2d(y, folded, autocast(b.to(y.dtype)), stride, padding))
    features = F.conv2d(
        y, autocast(stem.proj_weight), autocast(stem.proj_bias), stem.strides[-1], stem.paddings[-1]
    )
    return assemble(features, class_token, pos_embed)
