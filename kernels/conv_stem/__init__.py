"""The early-convolution stem, from the image to the encoder's token tensor, as one op."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fastvitc.kernels.batch_norm.formulas import update_running
from fastvitc.kernels.batch_norm.group import group_name, group_size
from fastvitc.kernels.choice.backends import Backends, Choice, resolve
from fastvitc.kernels.choice.checks import check_dtype
from fastvitc.kernels.choice.dtypes import accumulation_dtype, autocast, autocast_dtype
from fastvitc.kernels.choice.layout import copied_as
from fastvitc.kernels.conv_stem import composed, library
from fastvitc.kernels.conv_stem.arguments import Layers, Pixels, Stem
from fastvitc.kernels.conv_stem.checks import check
from fastvitc.kernels.conv_stem.pixels import mixed
from fastvitc.kernels.cpu.build import no_native
from fastvitc.kernels.gpu import no_triton

_BACKENDS = Backends(
    op="conv_stem",
    order={
        "cpu": ("native", "torch", "triton", "bn_relu", "reference"),
        "default": ("torch", "triton", "bn_relu", "reference"),
    },
    modules={
        "torch": "library",
        "triton": "triton.stem",
        "bn_relu": "composed",
        "native": "composed",
        "reference": "reference",
    },
    unavailable={"triton": no_triton, "bn_relu": no_triton, "native": no_native},
    sharing=("triton", "reference"),
)
#: Backends that are sequences of ops, left open to autograd and torch.compile.
_SEQUENCES = {
    "torch": library.conv_stem,
    "bn_relu": composed.with_triton,
    "native": composed.with_native,
}


def conv_stem(
    image: Tensor,
    layers: Layers,
    class_token: Tensor | None = None,
    pos_embed: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    pixels: Pixels | None = None,
    process_group: ProcessGroup | None = None,
    backend: Choice = "auto",
) -> Tensor:
    """n times convolution, BatchNorm, ReLU; a closing convolution; the token tensor (Xiao et al. 2021, section 4).

    With y_0 the mixed and normalised image of `Pixels`: z_i = conv(y_{i−1}, w_i), y_i = relu(BatchNorm(z_i)),
    features = conv(y_n, proj_weight) + proj_bias, tokens = [class token; features, row by row] + pos_embed.
    n = 0 is the patchify stem.

    Args:
        image: (B, C_0, H, W), floating point, or uint8 together with `pixels.scale` and `pixels.shift`. Under autocast
            it and the convolution weights are cast to the autocast dtype; BatchNorm, class token and position embedding
            keep theirs.
        layers: parameters and geometry, see `Layers`. In training the running statistics move in place by `momentum`.
        class_token: (1, 1, d) or None.
        pos_embed: (1, S, d) or None, S = h·w patch tokens, plus one where there is a class token.
        training: whether the batch's own statistics normalise.
        pixels: how the image is mixed and normalised, see `Pixels`; None leaves it as it is. Zero padding comes after
            it. A new mix of the same shape compiles nothing anew.
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
    The Triton backend mixes, normalises and clips a layer's input while it loads it, leaves partial statistics of its
    output, and in backward forms dz = A·dy' + B·z + C on load; `fastvitc.kernels.conv_stem.triton.stem` has the
    algorithm.
    Native computes channels-last whatever the layout of the image. It reads a uint8 image once and writes it mixed and
    normalised in the convolutions' dtype. It saves what PyTorch's convolutions save and z_i; BatchNorm and ReLU are two
    passes each way.
    From uint8 at 224 pixels, mixed, forward and backward, Triton moves 10.1 MB per image for the 1GF stem and 20.0 MB
    for the 4GF stem, 0.54 and 0.55 of inductor's own count (counted at batch 128, `python -m bench.traffic`). Its speed
    is not measured on a GPU.

    Raises:
        TypeError: a tensor of a dtype that does not fit (a uint8 image without its normalisation).
        ValueError: tensors on different devices, lists of different lengths, shapes that do not fit each other, an
            image that leaves no output.
        BackendUnavailable: an explicit backend that cannot run here.
    """
    scale, shift, mix = (None if t is None else t.detach() for t in pixels or Pixels())
    grids = check(image, layers, Pixels(scale, shift, mix), class_token, pos_embed, training)
    if mix is not None and image.is_floating_point():
        image, mix = mixed(image, mix), None
    group = group_name(process_group) if training else ""
    stem = Stem(layers, Pixels(scale, shift, mix), training, eps, group)
    dtype = autocast_dtype(layers.proj_weight)
    backend = resolve("conv_stem", backend, image.device.type, dtype, bool(group))
    for tensor_dtype in (dtype, *(t.dtype for t in (class_token, pos_embed) if t is not None)):
        check_dtype("conv_stem", backend, tensor_dtype)
    if backend in _SEQUENCES:
        return _SEQUENCES[backend](image, stem, class_token, pos_embed, momentum)
    if image.is_floating_point():
        image = autocast(image)
    if image.dtype not in (dtype, torch.uint8):
        raise TypeError(
            f"conv_stem: image and weights must have one dtype, got {image.dtype} and {dtype}; cast one of them, or "
            "use autocast"
        )
    packed = stem.packed()
    differentiable = image, *packed[0], class_token, pos_embed
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable)
    tokens, _, vectors = _forward(image, *packed, class_token, pos_embed, keep, dtype, backend)
    if training:
        images = group_size(group) * len(image)
        running = zip(layers.running_means, layers.running_vars, vectors, grids[:-1], strict=True)
        with torch.no_grad():
            for mean, var, of_layer, (height, width) in running:
                update_running(mean, var, of_layer, images * height * width, momentum)
    return tokens


@torch.library.custom_op("fastvitc::conv_stem", mutates_args=())
def _forward(
    image: Tensor,
    parameters: list[Tensor],
    running: list[Tensor],
    pixels: list[Tensor],
    strides: list[int],
    paddings: list[int],
    training: bool,
    eps: float,
    group: str,
    class_token: Tensor | None,
    pos_embed: Tensor | None,
    keep: bool,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(tokens, zs, vectors); in evaluation without `keep` the lists are empty. Convolutions are in `dtype`.

    The weights are cast in here, so that no copy of them is kept for the backward pass.
    """
    stem = Stem.unpacked(parameters, running, pixels, strides, paddings, training, eps, group)
    module = _BACKENDS.module(backend)
    with torch.autocast(image.device.type, enabled=False):
        if not training and not keep:
            return module.infer(image, stem, class_token, pos_embed, dtype).contiguous(), [], []
        tokens, zs, vectors = module.forward(image, stem.computing_in(dtype), class_token, pos_embed)
    zs = [z.contiguous(memory_format=torch.channels_last) for z in zs]
    wide = accumulation_dtype(dtype)
    return tokens.contiguous(), zs, [v.to(wide) for v in vectors]


@_forward.register_fake
def _(image, *arguments):
    *packed, class_token, pos_embed, keep, dtype, _ = arguments
    layers, _, training, *_ = Stem.unpacked(*packed)
    batch, grids = len(image), layers.grids(*image.shape[2:])
    tokens = grids[-1][0] * grids[-1][1] + int(class_token is not None)
    out_dtype = dtype if pos_embed is None else torch.promote_types(dtype, pos_embed.dtype)
    out = image.new_empty(batch, tokens, len(layers.proj_weight), dtype=out_dtype)
    if not training and not keep:
        return out, [], []
    channels = [len(weight) for weight in layers.conv_weights]
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
    training: bool,
    eps: float,
    group: str,
    zs: list[Tensor],
    vectors: list[Tensor],
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
    stem = Stem.unpacked(parameters, [], pixels, strides, paddings, training, eps, group)
    with torch.autocast(image.device.type, enabled=False):
        dimage, dparameters, dpos_embed = _BACKENDS.module(backend).backward(
            dtokens, image, stem.computing_in(dtype), zs, vectors, has_class_token, need_dimage
        )
    dparameters = [copied_as(d, p) for d, p in zip(dparameters, parameters, strict=True)]
    return [copied_as(dimage, image)] if need_dimage else [], dparameters, dpos_embed


@_backward.register_fake
def _(dtokens, image, parameters, *arguments):
    *_, need_dimage, _, _ = arguments
    dpos_embed = dtokens.new_empty(1, *dtokens.shape[1:], dtype=accumulation_dtype(dtokens.dtype))
    dimage = [torch.empty_like(image)] if need_dimage else []
    return dimage, [torch.empty_like(p) for p in parameters], dpos_embed


def _setup_context(ctx, inputs, output) -> None:
    image, parameters, running, pixels, *ctx.settings, class_token, pos_embed, _, dtype, backend = inputs
    ctx.choice = dtype, backend
    _, zs, vectors = output
    ctx.lengths = [len(part) for part in (parameters, pixels, zs, vectors)]
    ctx.statistics = len(running)
    ctx.class_dtype = None if class_token is None else class_token.dtype
    ctx.pos_dtype = None if pos_embed is None else pos_embed.dtype
    ctx.need_dimage = image.requires_grad
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(image, *parameters, *pixels, *zs, *vectors)


def _autograd(ctx, dtokens: Tensor | None, _dzs, _dvectors):
    """Gradients of the inputs of `_forward`."""
    constants = [None] * ctx.statistics, [None] * ctx.lengths[1], *(None,) * len(ctx.settings)
    if dtokens is None:
        return None, [None] * ctx.lengths[0], *constants, *(None,) * 5
    image, *flat = ctx.saved_tensors
    parameters, pixels, zs, vectors = (list(part) for part in _split(flat, ctx.lengths))
    has_class_token = ctx.class_dtype is not None
    dimage, dparameters, dpos_embed = _backward(
        dtokens,
        image,
        parameters,
        pixels,
        *ctx.settings,
        zs,
        vectors,
        has_class_token,
        ctx.need_dimage,
        *ctx.choice,
    )
    return (
        dimage[0] if ctx.need_dimage else None,
        dparameters,
        *constants,
        # A copy: it must share no memory with the next.
        dpos_embed[:, :1].to(ctx.class_dtype, copy=True) if has_class_token else None,
        None if ctx.pos_dtype is None else dpos_embed.to(ctx.pos_dtype),
        *(None,) * 3,
    )


def _split(flat: list[Tensor], lengths: list[int]):
    for length in lengths:
        yield flat[:length]
        flat = flat[length:]


_forward.register_autograd(_autograd, setup_context=_setup_context)
