"""The stem on the GPU: one kernel for each convolution and direction, no pass of BatchNorm or ReLU alone.

Forward. The first convolution mixes and normalises the image while it loads it; each other one normalises and clips
    z_{i−1} while it loads it. A convolution writes z_i and partial statistics, and a merge turns those into the layer's
    scale and shift. The closing convolution reads z_n the same way and writes the token tensor.
Backward, from the top. The input gradient of a convolution is masked by the recomputed scale·z + shift > 0 where it is
    made, and leaves partial sums of dy' and dy'·(z − mean). Their merge gives dγ, dβ and the A, B, C of
    dz = A·dy' + B·z + C. Both gradients of the convolution below form dz while they load.
Saved between the passes: the image as it came, z_i, and four vectors per layer.
In evaluation BatchNorm is folded into the convolutions.

After the cuDNN graph pattern scale-bias-relu-conv-genstats and its backward, which no library offers PyTorch. Limits:
a convolution reads each input element once per tap from the caches and normalises it each time; statistics of a layer
need its whole output, so layers cannot be fused into each other.

Not measured on a GPU.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvitc.kernels.batch_norm.formulas import layer_vectors, scale_shift
from fastvitc.kernels.batch_norm.merge import gradients_of, vectors_of
from fastvitc.kernels.conv_stem.arguments import Layers, Stem
from fastvitc.kernels.conv_stem.triton.launch import Convolution, Gradient, Input


def _pixels(image: Tensor, stem: Stem) -> Input:
    """What the first convolution reads."""
    scale, shift, mix = stem.pixels
    dense = image.contiguous(memory_format=torch.channels_last)
    if scale is None or shift is None:
        return Input(dense)
    return Input(dense, torch.stack([scale, shift]).float(), mix=mix)


def _layer(z: Tensor, vectors: Tensor) -> Input:
    """What a convolution reads of the layer below."""
    return Input(z, vectors[2:], relu=True)


def _convolutions(image: Tensor, layers: Layers) -> list[Convolution]:
    shapes = [image.shape[1:]]
    for weight, grid in zip(layers.conv_weights, layers.grids(*image.shape[2:]), strict=False):
        shapes.append(torch.Size((len(weight), *grid)))
    geometry = zip(shapes, layers.convolutions(), layers.strides, layers.paddings, strict=True)
    return [Convolution((len(image), *shape), *convolution) for shape, *convolution in geometry]


def _tokens(
    convolution: Convolution,
    source: Input,
    layers: Layers,
    class_token: Tensor | None,
    pos_embed: Tensor | None,
) -> Tensor:
    dtype = layers.proj_weight.dtype
    if pos_embed is not None:
        dtype, pos_embed = torch.promote_types(dtype, pos_embed.dtype), pos_embed.contiguous()
    if class_token is not None:
        class_token = class_token.contiguous()
    return convolution.tokens(source, layers.proj_bias.contiguous(), class_token, pos_embed, dtype)


def forward(
    image: Tensor, stem: Stem, class_token: Tensor | None, pos_embed: Tensor | None
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    layers = stem.layers
    *convolutions, closing = _convolutions(image, layers)
    source, zs, vectors = _pixels(image, stem), [], []
    for i, convolution in enumerate(convolutions):
        affine = layers.bn_weights[i].contiguous(), layers.bn_biases[i].contiguous(), stem.eps
        if stem.training:
            z, partial, per_set = convolution.forward(source)
            values = z.numel() // z.shape[1]
            vectors.append(vectors_of(partial, values, per_set, *affine, stem.group))
        else:
            z = convolution.forward_raw(source)
            statistics = layers.running_means[i], layers.running_vars[i]
            vectors.append(layer_vectors(*statistics, *affine).float())
        zs.append(z)
        source = _layer(z, vectors[i])
    return _tokens(closing, source, layers, class_token, pos_embed), zs, vectors


def infer(
    image: Tensor, stem: Stem, class_token: Tensor | None, pos_embed: Tensor | None, dtype: torch.dtype
) -> Tensor:
    layers = stem.layers
    folded, biases = [], []
    for weight, gamma, beta, mean, var in zip(*layers[:5], strict=True):
        scale, shift = scale_shift(mean, var, gamma, beta, stem.eps)
        folded.append(weight * scale.view(-1, 1, 1, 1))
        biases.append(shift)
    layers = layers._replace(conv_weights=folded).computing_in(dtype)
    *convolutions, closing = _convolutions(image, layers)
    source = _pixels(image, stem)
    for convolution, bias in zip(convolutions, biases, strict=True):
        source = Input(convolution.forward_relu(source, bias))
    return _tokens(closing, source, layers, class_token, pos_embed)


def backward(
    dtokens: Tensor,
    image: Tensor,
    stem: Stem,
    zs: Sequence[Tensor],
    vectors: Sequence[Tensor],
    has_class_token: bool,
    need_dimage: bool,
) -> tuple[Tensor | None, list[Tensor], Tensor]:
    dtokens = dtokens.contiguous()
    first = int(has_class_token)
    convolutions = list(enumerate(_convolutions(image, stem.layers)))
    sum_images = bool(zs) and convolutions[-1][1].disjoint
    gradient = Gradient(dtokens, first=first)
    dconv: list[Tensor] = []
    dgamma: list[Tensor] = []
    dbeta: list[Tensor] = []
    dimage = dpatches = None
    for i, convolution in reversed(convolutions):
        if i == 0:
            dconv.insert(0, convolution.weight_gradient(_pixels(image, stem), gradient))
            if need_dimage:
                dimage, _, _ = convolution.input_gradient(gradient, image, None)
            continue
        z, of_layer = zs[i - 1], vectors[i - 1]
        dconv.insert(0, convolution.weight_gradient(_layer(z, of_layer), gradient))
        closing = i == len(zs)
        dy, partial, sums = convolution.input_gradient(
            gradient, z, of_layer, sum_images=closing and sum_images
        )
        dpatches = sums if closing else dpatches
        values = z.numel() // z.shape[1]
        dg, db, coefficients = gradients_of(partial, values, of_layer, stem.training, stem.eps, stem.group)
        dgamma.insert(0, dg)
        dbeta.insert(0, db)
        gradient = Gradient(dy, z, coefficients)
    if dimage is not None and stem.pixels.scale is not None:
        dimage = dimage * stem.pixels.scale.view(1, -1, 1, 1)
    if dpatches is None:
        dpos_embed = dtokens.sum(0, keepdim=True, dtype=torch.float32)
    else:
        dpos_embed = torch.cat(
            [dtokens[:, :first].sum(0, keepdim=True, dtype=torch.float32), dpatches], dim=1
        )
    *dconv, dproj_weight = dconv
    dproj_bias = dpos_embed[0, first:].sum(0)
    return dimage, [*dconv, *dgamma, *dbeta, dproj_weight, dproj_bias], dpos_embed
