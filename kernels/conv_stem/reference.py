"""The stem in plain PyTorch: the oracle of every other backend. Any device, any floating dtype.

Between layers only z, the convolution's output rounded to the dtype of the image, is kept; everything else is
recomputed from it. n layers; lists run over the layers, `strides` and `paddings` over the layers and the closing
convolution.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvitc.kernels._batch_norm import normalize_relu, normalize_relu_backward, statistics
from fastvitc.kernels._dtype import accumulation_dtype
from fastvitc.kernels._tokens import assemble


def _convolve(y: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    dtype = accumulation_dtype(y.dtype)
    wide_bias = None if bias is None else bias.to(dtype)
    return F.conv2d(y.to(dtype), weight.to(dtype), wide_bias, stride, padding).to(y.dtype)


def _convolve_backward(
    dz: Tensor, y: Tensor, weight: Tensor, stride: int, padding: int, need_dy: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """(dy, dweight, dbias) of `_convolve`, each rounded once."""
    dtype = accumulation_dtype(y.dtype)
    dy, dweight, dbias = torch.ops.aten.convolution_backward(
        dz.to(dtype),
        y.to(dtype),
        weight.to(dtype),
        [weight.shape[0]],
        [stride] * 2,
        [padding] * 2,
        [1, 1],
        False,
        [0, 0],
        1,
        [need_dy, True, True],
    )
    return (dy.to(y.dtype) if need_dy else None), dweight, dbias


def forward(
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
    eps: float,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """(tokens, z of each layer, mean of each layer, biased variance of each layer)."""
    y, zs, means, variances = image, [], [], []
    for i, weight in enumerate(conv_weights):
        z = _convolve(y, weight, None, strides[i], paddings[i])
        mean, var = statistics(z) if training else (running_means[i].clone(), running_vars[i].clone())
        y = normalize_relu(z, mean, var, bn_weights[i], bn_biases[i], eps)
        zs.append(z)
        means.append(mean)
        variances.append(var)
    features = _convolve(y, proj_weight, proj_bias, strides[-1], paddings[-1])
    return assemble(features, class_token, pos_embed), zs, means, variances


def backward(
    dtokens: Tensor,
    image: Tensor,
    conv_weights: Sequence[Tensor],
    bn_weights: Sequence[Tensor],
    bn_biases: Sequence[Tensor],
    proj_weight: Tensor,
    zs: Sequence[Tensor],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    strides: Sequence[int],
    paddings: Sequence[int],
    training: bool,
    eps: float,
    grid: tuple[int, int],
    has_class_token: bool,
    need_dimage: bool,
) -> tuple[Tensor | None, list[Tensor], list[Tensor], list[Tensor], Tensor, Tensor, Tensor]:
    """(dimage, dconv_weights, dbn_weights, dbn_biases, dproj_weight, dproj_bias, dpos_embed).

    The gradient of the class token is the first row of dpos_embed.
    """
    n = len(conv_weights)

    def activation(layer: int) -> Tensor:
        if layer < 0:
            return image
        stats = means[layer], variances[layer]
        return normalize_relu(zs[layer], *stats, bn_weights[layer], bn_biases[layer], eps)

    dpos_embed = dtokens.to(accumulation_dtype(dtokens.dtype)).sum(0, keepdim=True)
    dfeatures = dtokens[:, int(has_class_token) :].mT.unflatten(2, grid)
    need_dy = need_dimage or n > 0
    dy, dproj_weight, dproj_bias = _convolve_backward(
        dfeatures, activation(n - 1), proj_weight, strides[-1], paddings[-1], need_dy
    )
    dconv: list[Tensor] = []
    dgamma: list[Tensor] = []
    dbeta: list[Tensor] = []
    for i in reversed(range(n)):
        stats = means[i], variances[i]
        dz, dg, db = normalize_relu_backward(dy, zs[i], *stats, bn_weights[i], bn_biases[i], eps, training)
        need_dy = need_dimage or i > 0
        dy, dw, _ = _convolve_backward(
            dz, activation(i - 1), conv_weights[i], strides[i], paddings[i], need_dy
        )
        dconv.insert(0, dw)
        dgamma.insert(0, dg)
        dbeta.insert(0, db)
    return dy, dconv, dgamma, dbeta, dproj_weight, dproj_bias, dpos_embed
