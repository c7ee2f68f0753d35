"""The stem by PyTorch's convolutions (cuDNN, oneDNN), BatchNorm folded into them in evaluation."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from fastvitc.kernels._batch_norm import scale_shift
from fastvitc.kernels._dtype import autocast
from fastvitc.kernels._tokens import assemble


def conv_stem(
    image: Tensor,
    conv_weights: Sequence[Tensor],
    bn_weights: Sequence[Tensor],
    bn_biases: Sequence[Tensor],
    running_means: Sequence[Tensor],
    running_vars: Sequence[Tensor],
    proj_weight: Tensor,
    proj_bias: Tensor,
    class_token: Tensor | None,
    pos_embed: Tensor | None,
    strides: Sequence[int],
    paddings: Sequence[int],
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    y = image
    layers = zip(
        conv_weights, bn_weights, bn_biases, running_means, running_vars, strides, paddings, strict=False
    )
    for weight, gamma, beta, mean, var, stride, padding in layers:
        if training:
            z = F.conv2d(y, autocast(weight), None, stride, padding)
            y = F.relu(F.batch_norm(z, mean, var, gamma, beta, True, momentum, eps))
        else:
            a, b = scale_shift(mean, var, gamma, beta, eps)
            folded = autocast((weight * a.view(-1, 1, 1, 1)).to(image.dtype))
            y = F.relu(F.conv2d(y, folded, autocast(b.to(image.dtype)), stride, padding))
    features = F.conv2d(y, autocast(proj_weight), autocast(proj_bias), strides[-1], paddings[-1])
    return assemble(features, class_token, pos_embed)
