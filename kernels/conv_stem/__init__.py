"""The early-convolution stem, from the image to the encoder's token tensor, as one op."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fastvitc.kernels.batch_norm.formulas import update_running
from fastvitc.kernels.batch_norm.group import group_name, group_size, synchronizing
from fastvitc.kernels.choice.backends import Backends, Choice, no_triton, resolve
from fastvitc.kernels.choice.checks import check_device, check_dtype, check_floating
from fastvitc.kernels.choice.dtypes import accumulation_dtype, autocast, autocast_dtype
from fastvitc.kernels.conv_stem import composed, library
from fastvitc.kernels.conv_stem.arguments import Stem
from fastvitc.kernels.cpu.build import no_native

_BACKENDS = Backends(
    op="conv_stem",
    order={
        "cpu": ("native", "torch", "triton", "bn_relu", "reference"),
        "default": ("torch", "triton", "bn_relu", "reference"),
    },
    rooms={
        "torch": "library",
        "triton": "triton.stem",
        "bn_relu": "composed",
        "native": "composed",
        "reference": "reference",
    },
    obstacle={"triton": no_triton, "bn_relu": no_triton, "native": no_native},
)
#: Backends that are sequences of ops, left open to autograd and torch.compile.
_SEQUENCES = {
    "torch": library.conv_stem,
    "bn_relu": composed.with_triton,
    "native": composed.with_native,
}


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
    pixel_scale: Tensor | None = None,
    pixel_shift: Tensor | None = None,
    process_group: ProcessGroup | None = None,
    backend: Choice = "auto",
) -> Tensor:
    """n times convolution, BatchNorm, ReLU; a closing convolution; the token tensor (Xiao et al. 2021, section 4).

    With y_0 = pixel_scale·image + pixel_shift: z_i = conv(y_{i−1}, w_i), y_i = relu(BatchNorm(z_i)),
    features = conv(y_n, proj_weight) + proj_bias, tokens = [class token; features, row by row] + pos_embed.
    n = 0 is the patchify stem.

    Args:
        image: (B, C_0, H, W), floating point and normalised, or uint8 together with `pixel_scale` and `pixel_shift`.
            Under autocast it and the convolution weights are cast to the autocast dtype; BatchNorm, class token and
            position embedding keep theirs.
        conv_weights: n tensors (C_i, C_{i−1}, k, k).
        bn_weights, bn_biases, running_means, running_vars: n tensors (C_i,) each; in training the running
            statistics move in place by `momentum`.
        proj_weight, proj_bias: (d, C_n, k, k) and (d,).
        class_token: (1, 1, d) or None.
        pos_embed: (1, S, d) or None, S = h·w patch tokens, plus one where there is a class token.
        training: whether the batch's own statistics normalise.
        strides, paddings: n + 1 integers, one per convolution.
        pixel_scale, pixel_shift: (C_0,) float, both or none; the normalisation of the image. Zero padding comes after
            it.
        process_group: processes whose batches share the training statistics, as in nn.SyncBatchNorm; each holds the
            same number of values. None for this process alone. The backends torch, bn_relu and native do not share
            them.
        backend: "auto"; "torch" (PyTorch's convolutions; BatchNorm folded into them in evaluation); "triton" (one
            kernel per convolution and direction, no normalisation pass); "bn_relu" (PyTorch's convolutions with the
            Triton kernels of that op between them); "native" (the same on a CPU, with this library's CPU kernels); or
            "reference".

    Returns:
        Tokens (B, S, d) in the dtype that the convolution weights and `pos_embed` promote to.

    The gradient cannot be differentiated again but by the backend torch.
    Convolutions accumulate and statistics run in float32 (float64 for float64 input). Triton and the reference save
    the image as it came, z_i in the dtype of the weights, and four vectors per channel; backward recomputes the rest.
    The Triton backend normalises and clips a layer's input while it loads it, leaves partial statistics of its output,
    and in backward forms dz = A·dy' + B·z + C on load; `fastvitc.kernels.conv_stem.triton.stem` has the algorithm.
    Native computes channels-last whatever the layout of the image, reads a uint8 image once and writes it normalised in
    the convolutions' dtype, and saves what PyTorch's convolutions save and z_i; BatchNorm and ReLU are two passes each
    way.
    From uint8 at 224 pixels, forward and backward, Triton moves 10.1 MB per image for the 1GF stem and 20.0 MB for the
    4GF stem, 0.54 and 0.55 of inductor's own count (counted at batch 128, `python -m bench.traffic`). Its speed is not
    measured on a GPU.

    Raises:
        TypeError: a tensor of a dtype that does not fit (a uint8 image without its normalisation).
        ValueError: tensors on different devices, lists of different lengths, shapes that do not fit each other, an
            image that leaves no output.
        BackendUnavailable: an explicit backend that cannot run here.
    """
    stem = Stem(
        conv_weights,
        bn_weights,
        bn_biases,
        proj_weight,
        proj_bias,
        None if pixel_scale is None else pixel_scale.detach(),
        None if pixel_shift is None else pixel_shift.detach(),
        strides,
        paddings,
        eps,
        group_name(process_group) if training else "",
    )
    grids = _check(image, stem, running_means, running_vars, class_token, pos_embed, training)
    dtype = autocast_dtype(proj_weight)
    backend = (synchronizing if stem.group else resolve)("conv_stem", backend, image.device.type, dtype)
    running = running_means, running_vars
    for tensor_dtype in (dtype, *(t.dtype for t in (class_token, pos_embed) if t is not None)):
        check_dtype("conv_stem", backend, tensor_dtype)
    if backend in _SEQUENCES:
        return _SEQUENCES[backend](image, stem, *running, class_token, pos_embed, training, momentum)
    if image.is_floating_point():
        image = autocast(image)
    if image.dtype not in (dtype, torch.uint8):
        raise TypeError(
            f"conv_stem: image and weights must have one dtype, got {image.dtype} and {dtype}; cast one of them, or "
            "use autocast"
        )
    differentiable = image, *stem.packed()[0], class_token, pos_embed
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable)
    ends = class_token, pos_embed, training, keep, dtype, backend
    statistics = [t.detach() for t in (*running_means, *running_vars)]
    tokens, _, vectors = _forward(image, *stem.packed(), statistics, *ends)
    if training:
        processes = group_size(stem.group)
        with torch.no_grad():
            for mean, var, of_layer, (height, width) in zip(*running, vectors, grids[:-1], strict=True):
                update_running(mean, var, of_layer, processes * image.shape[0] * height * width, momentum)
    return tokens


def _check(
    image, stem, running_means, running_vars, class_token, pos_embed, training
) -> list[tuple[int, int]]:
    """Raise for inputs that do not fit each other; return the grid (h, w) of each convolution's output."""
    layers = (stem.conv_weights, stem.bn_weights, stem.bn_biases, running_means, running_vars)
    n = len(stem.conv_weights)
    if image.dim() != 4:
        raise ValueError(
            f"conv_stem: image must be (B, C, H, W), got {image.dim()} dimensions {tuple(image.shape)}"
        )
    _check_pixels(image, stem)
    names = ("conv_weights", "bn_weights", "bn_biases", "running_means", "running_vars")
    lists = {
        f"{name}[{i}]": t for name, layer in zip(names, layers, strict=True) for i, t in enumerate(layer)
    }
    ends = {"class_token": class_token, "pos_embed": pos_embed, "proj_weight": stem.proj_weight}
    pixels = {"proj_bias": stem.proj_bias, "pixel_scale": stem.pixel_scale, "pixel_shift": stem.pixel_shift}
    tensors = {name: t for name, t in {**lists, **ends, **pixels}.items() if t is not None}
    check_device("conv_stem", "image", image, **tensors)
    check_floating("conv_stem", **tensors)
    dtypes = {weight.dtype for weight in (*stem.conv_weights, stem.proj_weight)}
    if len(dtypes) > 1:
        raise TypeError(
            f"conv_stem: the convolution weights must share a dtype, got {sorted(map(str, dtypes))}"
        )
    lengths = [len(layer) for layer in layers] + [len(stem.strides) - 1, len(stem.paddings) - 1]
    if any(length != n for length in lengths):
        raise ValueError(
            "conv_stem: the five lists over the layers need n entries and strides and paddings n + 1, got "
            f"{lengths[:5]} and {len(stem.strides)}, {len(stem.paddings)}"
        )
    if not all(isinstance(size, int) and size >= 1 for size in stem.strides) or not all(
        isinstance(size, int) and size >= 0 for size in stem.paddings
    ):
        raise ValueError(
            "conv_stem: strides must be integers from 1 and paddings from 0, got "
            f"{tuple(stem.strides)} and {tuple(stem.paddings)}"
        )
    channels = image.shape[1]
    for i, weight in enumerate([*stem.conv_weights, stem.proj_weight]):
        if weight.dim() != 4 or weight.shape[1] != channels:
            raise ValueError(
                f"conv_stem: convolution {i} needs a weight (out, {channels}, k, k), got {tuple(weight.shape)}"
            )
        channels = weight.shape[0]
        vectors = [layer[i] for layer in layers[1:]] if i < n else [stem.proj_bias]
        for vector in vectors:
            if vector.shape != (channels,):
                raise ValueError(
                    f"conv_stem: the vectors of convolution {i} must be ({channels},), got {tuple(vector.shape)}"
                )
    grids = stem.grids(*image.shape[2:])
    (height, width), d = grids[-1], stem.proj_weight.shape[0]
    if any(min(grid) < 1 for grid in grids):
        raise ValueError(f"conv_stem: an image of {image.shape[2]}x{image.shape[3]} leaves no tokens")
    if class_token is not None and class_token.shape != (1, 1, d):
        raise ValueError(f"conv_stem: class_token must be (1, 1, {d}), got {tuple(class_token.shape)}")
    values = [image.shape[0] * h * w for h, w in grids[:-1]]
    if training and values and min(values) < 2:
        raise ValueError(
            f"conv_stem: training needs more than one value per channel, got image {tuple(image.shape)}"
        )
    tokens = height * width + int(class_token is not None)
    if pos_embed is not None and pos_embed.shape != (1, tokens, d):
        raise ValueError(
            f"conv_stem: pos_embed must be (1, {tokens}, {d}) for a {height}x{width} grid, "
            f"got {tuple(pos_embed.shape)}"
        )
    return grids


def _check_pixels(image: Tensor, stem: Stem) -> None:
    vectors = {"pixel_scale": stem.pixel_scale, "pixel_shift": stem.pixel_shift}
    given = {name: vector for name, vector in vectors.items() if vector is not None}
    if len(given) == 1:
        raise ValueError(f"conv_stem: pixel_scale and pixel_shift go together, got only {next(iter(given))}")
    for name, vector in given.items():
        if vector.shape != image.shape[1:2]:
            raise ValueError(f"conv_stem: {name} must be ({image.shape[1]},), got {tuple(vector.shape)}")
    if not image.is_floating_point() and (image.dtype != torch.uint8 or not given):
        raise TypeError(
            f"conv_stem: image must be a floating-point tensor, or uint8 with pixel_scale and pixel_shift, got "
            f"{image.dtype}{'' if given else ' without them'}"
        )


def _laid_out_as(value: Tensor, like: Tensor) -> Tensor:
    """`value` in the dtype and strides of `like`, the layout that the fake implementations promise."""
    return torch.empty_like(like).copy_(value)


@torch.library.custom_op("fastvitc::conv_stem", mutates_args=())
def _forward(
    image: Tensor,
    parameters: list[Tensor],
    pixels: list[Tensor],
    strides: list[int],
    paddings: list[int],
    eps: float,
    group: str,
    running: list[Tensor],
    class_token: Tensor | None,
    pos_embed: Tensor | None,
    training: bool,
    keep: bool,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(tokens, zs, vectors); in evaluation without `keep` the lists are empty. Convolutions are in `dtype`.

    The weights are cast in here, so that no copy of them is kept for the backward pass.
    """
    stem = Stem.unpacked(parameters, pixels, strides, paddings, eps, group)
    n = len(stem.conv_weights)
    statistics = None if training else list(zip(running[:n], running[n:], strict=True))
    room = _BACKENDS.room(backend)
    with torch.autocast(image.device.type, enabled=False):
        if statistics is not None and not keep:
            return room.infer(image, stem, dtype, statistics, class_token, pos_embed).contiguous(), [], []
        stem = stem.computing_in(dtype)
        tokens, zs, vectors = room.forward(image, stem, statistics, class_token, pos_embed)
    zs = [z.contiguous(memory_format=torch.channels_last) for z in zs]
    wide = accumulation_dtype(dtype)
    return tokens.contiguous(), zs, [v.to(wide) for v in vectors]


@_forward.register_fake
def _(
    image,
    parameters,
    pixels,
    strides,
    paddings,
    eps,
    group,
    _,
    class_token,
    pos_embed,
    training,
    keep,
    dtype,
    __,
):
    stem = Stem.unpacked(parameters, pixels, strides, paddings, eps, group)
    batch, grids = image.shape[0], stem.grids(*image.shape[2:])
    tokens = grids[-1][0] * grids[-1][1] + int(class_token is not None)
    out_dtype = dtype if pos_embed is None else torch.promote_types(dtype, pos_embed.dtype)
    out = image.new_empty(batch, tokens, len(stem.proj_weight), dtype=out_dtype)
    if not training and not keep:
        return out, [], []
    channels = [len(weight) for weight in stem.conv_weights]
    zs = [
        torch.empty_like(image.new_empty(batch, c, *grid, dtype=dtype), memory_format=torch.channels_last)
        for c, grid in zip(channels, grids, strict=False)
    ]
    return out, zs, [image.new_empty(4, c, dtype=accumulation_dtype(dtype)) for c in channels]


@torch.library.custom_op("fastvitc::conv_stem_backward", mutates_args=())
def _backward(
    dtokens: Tensor,
    image: Tensor,
    parameters: list[Tensor],
    pixels: list[Tensor],
    strides: list[int],
    paddings: list[int],
    eps: float,
    group: str,
    zs: list[Tensor],
    vectors: list[Tensor],
    training: bool,
    has_class_token: bool,
    need_dimage: bool,
    dtype: torch.dtype,
    backend: str,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """(dimage where it is needed, the gradients of `parameters`, dpos_embed)."""
    if len(image) == 0:
        dpos_embed = dtokens.new_zeros(1, *dtokens.shape[1:], dtype=accumulation_dtype(dtokens.dtype))
        dimage = [torch.zeros_like(image)] if need_dimage else []
        return dimage, [torch.zeros_like(p) for p in parameters], dpos_embed
    stem = Stem.unpacked(parameters, pixels, strides, paddings, eps, group).computing_in(dtype)
    with torch.autocast(image.device.type, enabled=False):
        dimage, dparameters, dpos_embed = _BACKENDS.room(backend).backward(
            dtokens, image, stem, zs, vectors, training, has_class_token, need_dimage
        )
    dparameters = [_laid_out_as(d, p) for d, p in zip(dparameters, parameters, strict=True)]
    return [_laid_out_as(dimage, image)] if need_dimage else [], dparameters, dpos_embed


@_backward.register_fake
def _(
    dtokens,
    image,
    parameters,
    pixels,
    s,
    p,
    e,
    group,
    zs,
    vectors,
    training,
    has,
    need_dimage,
    dtype,
    backend,
):
    dpos_embed = dtokens.new_empty(1, *dtokens.shape[1:], dtype=accumulation_dtype(dtokens.dtype))
    return (
        [torch.empty_like(image)] if need_dimage else [],
        [torch.empty_like(p) for p in parameters],
        dpos_embed,
    )


def _setup_context(ctx, inputs, output) -> None:
    image, parameters, pixels, *ctx.geometry, _, class_token, pos_embed, ctx.training, _, dtype, backend = (
        inputs
    )
    ctx.choice = dtype, backend
    _, zs, vectors = output
    ctx.lengths = [len(part) for part in (parameters, pixels, zs, vectors)]
    ctx.class_dtype = None if class_token is None else class_token.dtype
    ctx.pos_dtype = None if pos_embed is None else pos_embed.dtype
    ctx.need_dimage = image.requires_grad
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(image, *parameters, *pixels, *zs, *vectors)


def _autograd(ctx, dtokens: Tensor | None, _dzs, _dvectors):
    """Gradients of the inputs of `_forward`."""
    if dtokens is None:
        return None, [None] * ctx.lengths[0], [None] * ctx.lengths[1], *(None,) * 11
    image, *flat = ctx.saved_tensors
    parameters, pixels, zs, vectors = (list(part) for part in _split(flat, ctx.lengths))
    has_class_token = ctx.class_dtype is not None
    dimage, dparameters, dpos_embed = _backward(
        dtokens,
        image,
        parameters,
        pixels,
        *ctx.geometry,
        zs,
        vectors,
        ctx.training,
        has_class_token,
        ctx.need_dimage,
        *ctx.choice,
    )
    return (
        dimage[0] if ctx.need_dimage else None,
        dparameters,
        [None] * len(pixels),
        *(None,) * len(ctx.geometry),
        [None] * (2 * len(zs)),
        dpos_embed[:, :1].to(ctx.class_dtype, copy=True)
        if has_class_token
        else None,  # not a view of the next
        None if ctx.pos_dtype is None else dpos_embed.to(ctx.pos_dtype),
        *(None,) * 4,
    )


def _split(flat: list[Tensor], lengths: list[int]):
    for length in lengths:
        yield flat[:length]
        flat = flat[length:]


_forward.register_autograd(_autograd, setup_context=_setup_context)
