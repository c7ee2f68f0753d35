"""The early-convolution stem, from the image to the encoder's token tensor, as one op."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvitc.kernels._backend import Backends, resolve
from fastvitc.kernels._batch_norm import update_running
from fastvitc.kernels._dtype import accumulation_dtype, autocast, check_floating
from fastvitc.kernels.conv_stem import library

_BACKENDS = Backends(
    op="conv_stem",
    order={"default": ("torch", "reference")},
    rooms={"torch": "library", "reference": "reference"},
)


def conv_stem(
    image: Tensor,
    conv_weights: Sequence[Tensor],
    bn_weights: Sequence[Tensor],
    bn_biases: Sequence[Tensor],
    running_means: Sequence[Tensor],
    running_vars: Sequence[Tensor],
    proj_weight: Tensor,
    proj_bias: Tensor,
    class_token: Tensor | None = None,
    pos_embed: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    strides: Sequence[int],
    paddings: Sequence[int],
    backend: str = "auto",
) -> Tensor:
    """n times convolution, BatchNorm, ReLU; a closing convolution; the token tensor (Xiao et al. 2021, section 4).

    With y_0 = image: z_i = conv(y_{i−1}, w_i), y_i = relu(BatchNorm(z_i)),
    features = conv(y_n, proj_weight) + proj_bias, tokens = [class token; features, row by row] + pos_embed.
    n = 0 is the patchify stem.

    Args:
        image: (B, C_0, H, W), floating point and normalised. Under autocast it and the convolution weights are cast
            to the autocast dtype; BatchNorm, class token and position embedding keep theirs.
        conv_weights: n tensors (C_i, C_{i−1}, k, k).
        bn_weights, bn_biases, running_means, running_vars: n tensors (C_i,) each; in training the running
            statistics move in place by `momentum`.
        proj_weight, proj_bias: (d, C_n, k, k) and (d,).
        class_token: (1, 1, d) or None.
        pos_embed: (1, S, d) or None, S = h·w patch tokens, plus one where there is a class token.
        training: whether the batch's own statistics normalise.
        strides, paddings: n + 1 integers, one per convolution.
        backend: "auto", "torch" (PyTorch's convolutions; BatchNorm folded into them in evaluation) or "reference".

    Returns:
        Tokens (B, S, d) in the dtype that the image and `pos_embed` promote to.

    Convolutions accumulate and statistics run in float32 (float64 for float64 input). The reference saves the
    image, z_i in its dtype, and two vectors per channel; backward recomputes the rest.

    Raises:
        TypeError: a tensor is not floating point (a uint8 image has to be normalised first).
        ValueError: lists of different lengths, shapes that do not fit each other, an image that leaves no output.
        BackendUnavailable: an explicit backend that cannot run here.
    """
    layers = (conv_weights, bn_weights, bn_biases, running_means, running_vars)
    grid = _check(image, layers, proj_weight, proj_bias, class_token, pos_embed, strides, paddings, training)
    image = autocast(image)
    backend = resolve("conv_stem", backend, image.device.type)
    if backend == "torch":
        return library.conv_stem(
            image,
            *layers,
            proj_weight,
            proj_bias,
            class_token,
            pos_embed,
            strides,
            paddings,
            training,
            momentum,
            eps,
        )
    tokens, _, means, variances = _forward(
        image,
        [autocast(w) for w in conv_weights],
        *map(list, layers[1:]),
        autocast(proj_weight),
        autocast(proj_bias),
        class_token,
        pos_embed,
        list(strides),
        list(paddings),
        list(grid),
        training,
        eps,
        backend,
    )
    if training:
        shapes = _layer_shapes(image, conv_weights, strides, paddings)
        with torch.no_grad():
            stats = zip(running_means, running_vars, means, variances, shapes, strict=True)
            for running_mean, running_var, mean, var, (batch, _, height, width) in stats:
                update_running(running_mean, running_var, mean, var, batch * height * width, momentum)
    return tokens


def _layer_shapes(
    image: Tensor, weights: Sequence[Tensor], strides: Sequence[int], paddings: Sequence[int]
) -> list[tuple[int, int, int, int]]:
    """The (B, C, H, W) shape of each convolution's output."""
    batch, _, height, width = image.shape
    shapes = []
    for weight, stride, padding in zip(weights, strides, paddings, strict=False):
        height, width = (
            (side + 2 * padding - kernel) // stride + 1
            for side, kernel in zip((height, width), weight.shape[2:], strict=True)
        )
        shapes.append((batch, weight.shape[0], height, width))
    return shapes


def _check(
    image, layers, proj_weight, proj_bias, class_token, pos_embed, strides, paddings, training
) -> tuple[int, int]:
    """Raise for inputs that do not fit each other; return the token grid (h, w)."""
    conv_weights = layers[0]
    n = len(conv_weights)
    check_floating("conv_stem", image=image, proj_weight=proj_weight)
    if image.dim() != 4:
        raise ValueError(
            f"conv_stem: image must be (B, C, H, W), got {image.dim()} dimensions {tuple(image.shape)}"
        )
    lengths = [len(layer) for layer in layers] + [len(strides) - 1, len(paddings) - 1]
    if any(length != n for length in lengths):
        raise ValueError(
            "conv_stem: the five lists over the layers need n entries and strides and paddings n + 1, got "
            f"{lengths[:5]} and {len(strides)}, {len(paddings)}"
        )
    channels = image.shape[1]
    for i, weight in enumerate([*conv_weights, proj_weight]):
        if weight.dim() != 4 or weight.shape[1] != channels:
            raise ValueError(
                f"conv_stem: convolution {i} needs a weight (out, {channels}, k, k), got {tuple(weight.shape)}"
            )
        channels = weight.shape[0]
        vectors = [layer[i] for layer in layers[1:]] if i < n else [proj_bias]
        for vector in vectors:
            if vector.shape != (channels,):
                raise ValueError(
                    f"conv_stem: the vectors of convolution {i} must be ({channels},), got {tuple(vector.shape)}"
                )
    _, width, *grid = _layer_shapes(image, [*conv_weights, proj_weight], strides, paddings)[-1]
    if min(grid) < 1:
        raise ValueError(f"conv_stem: an image of {image.shape[2]}x{image.shape[3]} leaves no tokens")
    if class_token is not None and class_token.shape != (1, 1, width):
        raise ValueError(f"conv_stem: class_token must be (1, 1, {width}), got {tuple(class_token.shape)}")
    values = [b * h * w for b, _, h, w in _layer_shapes(image, conv_weights, strides, paddings)]
    if training and values and min(values) < 2:
        raise ValueError(
            f"conv_stem: training needs more than one value per channel, got image {tuple(image.shape)}"
        )
    tokens = grid[0] * grid[1] + (class_token is not None)
    if pos_embed is not None and pos_embed.shape != (1, tokens, width):
        raise ValueError(
            f"conv_stem: pos_embed must be (1, {tokens}, {width}) for a {grid[0]}x{grid[1]} grid, "
            f"got {tuple(pos_embed.shape)}"
        )
    return grid[0], grid[1]


def _laid_out_as(value: Tensor, like: Tensor) -> Tensor:
    """`value` in the dtype and strides of `like`, the layout that the fake implementations promise."""
    return torch.empty_like(like).copy_(value)


@torch.library.custom_op("fastvitc::conv_stem", mutates_args=())
def _forward(
    image: Tensor,
    conv_weights: list[Tensor],
    bn_weights: list[Tensor],
    bn_biases: list[Tensor],
    running_means: list[Tensor],
    running_vars: list[Tensor],
    proj_weight: Tensor,
    proj_bias: Tensor,
    class_token: Tensor | None,
    pos_embed: Tensor | None,
    strides: list[int],
    paddings: list[int],
    grid: list[int],
    training: bool,
    eps: float,
    backend: str,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    with torch.autocast(image.device.type, enabled=False):
        tokens, zs, means, variances = _BACKENDS.room(backend).forward(
            image,
            conv_weights,
            bn_weights,
            bn_biases,
            running_means,
            running_vars,
            proj_weight,
            proj_bias,
            class_token,
            pos_embed,
            strides,
            paddings,
            training,
            eps,
        )
    zs = [z.contiguous(memory_format=torch.channels_last) for z in zs]
    return tokens.contiguous(), zs, means, variances


@_forward.register_fake
def _(
    image,
    conv_weights,
    bn_weights,
    bn_biases,
    running_means,
    running_vars,
    proj_weight,
    proj_bias,
    class_token,
    pos_embed,
    strides,
    paddings,
    grid,
    training,
    eps,
    backend,
):
    dtype = image.dtype if pos_embed is None else torch.promote_types(image.dtype, pos_embed.dtype)
    tokens = grid[0] * grid[1] + (class_token is not None)
    out = image.new_empty(image.shape[0], tokens, proj_weight.shape[0], dtype=dtype)
    zs = [
        torch.empty_like(image.new_empty(shape), memory_format=torch.channels_last)
        for shape in _layer_shapes(image, conv_weights, strides, paddings)
    ]

    def vectors(like: list[Tensor]) -> list[Tensor]:
        if not training:
            return [torch.empty_like(v) for v in like]
        return [image.new_empty(z.shape[1], dtype=accumulation_dtype(image.dtype)) for z in zs]

    return out, zs, vectors(running_means), vectors(running_vars)


@torch.library.custom_op("fastvitc::conv_stem_backward", mutates_args=())
def _backward(
    dtokens: Tensor,
    image: Tensor,
    conv_weights: list[Tensor],
    bn_weights: list[Tensor],
    bn_biases: list[Tensor],
    proj_weight: Tensor,
    proj_bias: Tensor,
    zs: list[Tensor],
    means: list[Tensor],
    variances: list[Tensor],
    strides: list[int],
    paddings: list[int],
    grid: list[int],
    has_class_token: bool,
    need_dimage: bool,
    training: bool,
    eps: float,
    backend: str,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], Tensor, Tensor, Tensor]:
    with torch.autocast(image.device.type, enabled=False):
        dimage, dconv, dgamma, dbeta, dproj_weight, dproj_bias, dpos_embed = _BACKENDS.room(backend).backward(
            dtokens,
            image,
            conv_weights,
            bn_weights,
            bn_biases,
            proj_weight,
            zs,
            means,
            variances,
            strides,
            paddings,
            training,
            eps,
            (grid[0], grid[1]),
            has_class_token,
            need_dimage,
        )
    return (
        [_laid_out_as(dimage, image)] if need_dimage else [],
        [_laid_out_as(d, w) for d, w in zip(dconv, conv_weights, strict=True)],
        [_laid_out_as(d, w) for d, w in zip(dgamma, bn_weights, strict=True)],
        [_laid_out_as(d, w) for d, w in zip(dbeta, bn_biases, strict=True)],
        _laid_out_as(dproj_weight, proj_weight),
        _laid_out_as(dproj_bias, proj_bias),
        dpos_embed,
    )


@_backward.register_fake
def _(
    dtokens,
    image,
    conv_weights,
    bn_weights,
    bn_biases,
    proj_weight,
    proj_bias,
    zs,
    means,
    variances,
    strides,
    paddings,
    grid,
    has_class_token,
    need_dimage,
    training,
    eps,
    backend,
):
    return (
        [torch.empty_like(image)] if need_dimage else [],
        [torch.empty_like(w) for w in conv_weights],
        [torch.empty_like(w) for w in bn_weights],
        [torch.empty_like(b) for b in bn_biases],
        torch.empty_like(proj_weight),
        torch.empty_like(proj_bias),
        dtokens.new_empty(1, *dtokens.shape[1:], dtype=accumulation_dtype(dtokens.dtype)),
    )


def _setup_context(ctx, inputs, output) -> None:
    (
        image,
        conv_weights,
        bn_weights,
        bn_biases,
        _,
        _,
        proj_weight,
        proj_bias,
        class_token,
        pos_embed,
        *rest,
    ) = inputs
    ctx.strides, ctx.paddings, ctx.grid, ctx.training, ctx.eps, ctx.backend = rest
    _, zs, means, variances = output
    ctx.n = len(conv_weights)
    ctx.class_dtype = None if class_token is None else class_token.dtype
    ctx.pos_dtype = None if pos_embed is None else pos_embed.dtype
    ctx.need_dimage = image.requires_grad
    ctx.set_materialize_grads(False)
    lists = (conv_weights, bn_weights, bn_biases, zs, means, variances)
    ctx.save_for_backward(image, proj_weight, proj_bias, *(t for part in lists for t in part))


def _autograd(ctx, dtokens: Tensor | None, _dzs, _dmeans, _dvariances):
    if dtokens is None:
        return None, *([None] * ctx.n for _ in range(5)), *(None,) * 10
    image, proj_weight, proj_bias, *flat = ctx.saved_tensors
    n = ctx.n
    conv_weights, bn_weights, bn_biases, zs, means, variances = (flat[i * n : (i + 1) * n] for i in range(6))
    dimage, dconv, dgamma, dbeta, dproj_weight, dproj_bias, dpos_embed = _backward(
        dtokens,
        image,
        conv_weights,
        bn_weights,
        bn_biases,
        proj_weight,
        proj_bias,
        zs,
        means,
        variances,
        ctx.strides,
        ctx.paddings,
        ctx.grid,
        ctx.class_dtype is not None,
        ctx.need_dimage,
        ctx.training,
        ctx.eps,
        ctx.backend,
    )
    dclass_token = None if ctx.class_dtype is None else dpos_embed[:, :1].to(ctx.class_dtype)
    return (
        dimage[0] if ctx.need_dimage else None,
        dconv,
        dgamma,
        dbeta,
        [None] * n,
        [None] * n,
        dproj_weight,
        dproj_bias,
        dclass_token,
        None if ctx.pos_dtype is None else dpos_embed.to(ctx.pos_dtype),
        *(None,) * 6,
    )


_forward.register_autograd(_autograd, setup_context=_setup_context)
