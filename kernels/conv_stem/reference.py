"""The stem in plain PyTorch: the oracle of every other backend. Any device, any floating dtype.

Between layers only z, the convolution's output rounded to the dtype of the weights, is kept; everything else is
recomputed from it.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvitc.kernels.batch_norm.formulas import (
    gradient_sums,
    input_coefficients,
    input_gradient,
    layer_vectors,
    normalize_relu,
    statistics,
)
from fastvitc.kernels.batch_norm.group import mean_over_group, merged_statistics
from fastvitc.kernels.choice.dtypes import accumulation_dtype
from fastvitc.kernels.conv_stem.arguments import Stem
from fastvitc.kernels.conv_stem.pixels import normalized
from fastvitc.kernels.conv_stem.tokens import assemble


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


def _first_input(image: Tensor, stem: Stem) -> Tensor:
    return normalized(image, stem.pixels).to(stem.layers.proj_weight.dtype)


def forward(
    image: Tensor, stem: Stem, class_token: Tensor | None, pos_embed: Tensor | None
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(tokens, z of each layer, vectors (4, C) of each layer)."""
    layers = stem.layers
    y, zs, vectors = _first_input(image, stem), [], []
    for i, weight in enumerate(layers.conv_weights):
        z = _convolve(y, weight, None, layers.strides[i], layers.paddings[i])
        if stem.training:
            mean, var = merged_statistics(*statistics(z), z.numel() // z.shape[1], stem.group)
        else:
            mean, var = layers.running_means[i], layers.running_vars[i]
        zs.append(z)
        vectors.append(layer_vectors(mean, var, layers.bn_weights[i], layers.bn_biases[i], stem.eps))
        y = normalize_relu(z, vectors[i])
    features = _convolve(y, layers.proj_weight, layers.proj_bias, layers.strides[-1], layers.paddings[-1])
    return assemble(features, class_token, pos_embed), zs, vectors


def infer(
    image: Tensor, stem: Stem, class_token: Tensor | None, pos_embed: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The tokens in evaluation, where nothing is kept for a backward pass; convolutions are in `dtype`."""
    return forward(image, stem.computing_in(dtype), class_token, pos_embed)[0]


def backward(
    dtokens: Tensor,
    image: Tensor,
    stem: Stem,
    zs: Sequence[Tensor],
    vectors: Sequence[Tensor],
    has_class_token: bool,
    need_dimage: bool,
) -> tuple[Tensor | None, list[Tensor], Tensor]:
    """(dimage or None, the gradients of the stem's packed parameters, dpos_embed).

    The gradient of the class token is the first row of dpos_embed.
    """
    layers, n = stem.layers, len(zs)

    def activation(layer: int) -> Tensor:
        return _first_input(image, stem) if layer < 0 else normalize_relu(zs[layer], vectors[layer])

    dpos_embed = dtokens.to(accumulation_dtype(dtokens.dtype)).sum(0, keepdim=True)
    dfeatures = dtokens[:, int(has_class_token) :].mT.unflatten(2, layers.grids(*image.shape[2:])[-1])
    dy, dproj_weight, dproj_bias = _convolve_backward(
        dfeatures,
        activation(n - 1),
        layers.proj_weight,
        layers.strides[-1],
        layers.paddings[-1],
        need_dimage or n > 0,
    )
    dconv: list[Tensor] = []
    dgamma: list[Tensor] = []
    dbeta: list[Tensor] = []
    for i in reversed(range(n)):
        masked, dg, db = gradient_sums(dy, zs[i], vectors[i], stem.eps)
        sums = torch.stack([dg, db])
        count = zs[i].numel() // zs[i].shape[1]
        means = mean_over_group(sums / count, stem.group) if stem.training else torch.zeros_like(sums)
        dz = input_gradient(masked, zs[i], input_coefficients(vectors[i], *means, stem.eps))
        need_dy = need_dimage or i > 0
        dy, dw, _ = _convolve_backward(
            dz, activation(i - 1), layers.conv_weights[i], layers.strides[i], layers.paddings[i], need_dy
        )
        dconv.insert(0, dw)
        dgamma.insert(0, dg)
        dbeta.insert(0, db)
    if need_dimage and stem.pixels.scale is not None:
        dy = dy * stem.pixels.scale.view(1, -1, 1, 1)
    return dy, [*dconv, *dgamma, *dbeta, dproj_weight, dproj_bias], dpos_embed
