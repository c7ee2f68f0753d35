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
from fastvitc.kernels.conv_stem.ends import assemble, scaled_pixels


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


def _pixels(image: Tensor, stem: Stem) -> Tensor:
    return scaled_pixels(image, stem.pixel_scale, stem.pixel_shift).to(stem.proj_weight.dtype)


def forward(
    image: Tensor,
    stem: Stem,
    running: Sequence[tuple[Tensor, Tensor]] | None,
    class_token: Tensor | None,
    pos_embed: Tensor | None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(tokens, z of each layer, vectors (4, C) of each layer); `running` is None where the batch normalises itself."""
    y, zs, vectors = _pixels(image, stem), [], []
    for i, weight in enumerate(stem.conv_weights):
        z = _convolve(y, weight, None, stem.strides[i], stem.paddings[i])
        if running is None:
            mean, var = merged_statistics(*statistics(z), z.numel() // z.shape[1], stem.group)
        else:
            mean, var = running[i]
        zs.append(z)
        vectors.append(layer_vectors(mean, var, stem.bn_weights[i], stem.bn_biases[i], stem.eps))
        y = normalize_relu(z, vectors[i])
    features = _convolve(y, stem.proj_weight, stem.proj_bias, stem.strides[-1], stem.paddings[-1])
    return assemble(features, class_token, pos_embed), zs, vectors


def infer(
    image: Tensor,
    stem: Stem,
    dtype: torch.dtype,
    running: Sequence[tuple[Tensor, Tensor]],
    class_token: Tensor | None,
    pos_embed: Tensor | None,
) -> Tensor:
    """The tokens in evaluation, where nothing is kept for a backward pass; convolutions are in `dtype`."""
    return forward(image, stem.computing_in(dtype), running, class_token, pos_embed)[0]


def backward(
    dtokens: Tensor,
    image: Tensor,
    stem: Stem,
    zs: Sequence[Tensor],
    vectors: Sequence[Tensor],
    training: bool,
    has_class_token: bool,
    need_dimage: bool,
) -> tuple[Tensor | None, list[Tensor], Tensor]:
    """(dimage or None, the gradients of the stem's packed parameters, dpos_embed).

    The gradient of the class token is the first row of dpos_embed.
    """
    n = len(zs)
    grid = stem.grids(*image.shape[2:])[-1]

    def activation(layer: int) -> Tensor:
        return _pixels(image, stem) if layer < 0 else normalize_relu(zs[layer], vectors[layer])

    dpos_embed = dtokens.to(accumulation_dtype(dtokens.dtype)).sum(0, keepdim=True)
    dfeatures = dtokens[:, int(has_class_token) :].mT.unflatten(2, grid)
    dy, dproj_weight, dproj_bias = _convolve_backward(
        dfeatures,
        activation(n - 1),
        stem.proj_weight,
        stem.strides[-1],
        stem.paddings[-1],
        need_dimage or n > 0,
    )
    dconv: list[Tensor] = []
    dgamma: list[Tensor] = []
    dbeta: list[Tensor] = []
    for i in reversed(range(n)):
        masked, dg, db = gradient_sums(dy, zs[i], vectors[i], stem.eps)
        sums = torch.stack([dg, db])
        count = zs[i].numel() // zs[i].shape[1]
        means = mean_over_group(sums / count, stem.group) if training else torch.zeros_like(sums)
        dz = input_gradient(masked, zs[i], input_coefficients(vectors[i], *means, stem.eps))
        need_dy = need_dimage or i > 0
        dy, dw, _ = _convolve_backward(
            dz, activation(i - 1), stem.conv_weights[i], stem.strides[i], stem.paddings[i], need_dy
        )
        dconv.insert(0, dw)
        dgamma.insert(0, dg)
        dbeta.insert(0, db)
    if need_dimage and stem.pixel_scale is not None:
        dy = dy * stem.pixel_scale.view(1, -1, 1, 1)
    return dy, [*dconv, *dgamma, *dbeta, dproj_weight, dproj_bias], dpos_embed
