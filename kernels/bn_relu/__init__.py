"""Batch normalisation followed by ReLU, as one op."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fastvitc.kernels.batch_norm.formulas import update_running
from fastvitc.kernels.batch_norm.group import group_name, group_size
from fastvitc.kernels.bn_relu import library
from fastvitc.kernels.bn_relu.arguments import Norm
from fastvitc.kernels.choice.backends import Backends, Choice, resolve
from fastvitc.kernels.choice.checks import check_device, check_dtype, check_floating
from fastvitc.kernels.choice.dtypes import accumulation_dtype
from fastvitc.kernels.choice.layout import copied_as, laid_out_as
from fastvitc.kernels.cpu.build import no_native
from fastvitc.kernels.gpu import no_triton

_BACKENDS = Backends(
    op="bn_relu",
    order={
        "cpu": ("native", "torch", "triton", "reference"),
        "default": ("torch", "triton", "reference"),
    },
    modules={"torch": "library", "triton": "triton", "native": "native", "reference": "reference"},
    unavailable={"triton": no_triton, "native": no_native},
    sharing=("triton", "reference"),
)


def bn_relu(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor,
    bias: Tensor,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    process_group: ProcessGroup | None = None,
    backend: Choice = "auto",
) -> Tensor:
    """relu(weight · (x − mean) / sqrt(var + eps) + bias) per channel (Ioffe & Szegedy 2015, algorithm 1).

    Args:
        x: (B, C, H, W), floating point, any strides (channels-last is the fast one).
        running_mean, running_var: (C,), float. In training they move in place by `momentum` towards the batch's
            mean and unbiased variance; in evaluation they are the mean and the variance.
        weight, bias: (C,), float; they may be wider than x (float32 beside bfloat16 activations).
        training: whether the batch's own mean and biased variance normalise.
        process_group: processes whose batches share the training statistics, as in nn.SyncBatchNorm; each holds
            the same number of values. None for this process alone. The backends torch and native do not share them.
        backend: "auto", "torch" (`batch_norm` and `relu`), "triton", "native" (this library's CPU kernels) or
            "reference"; or a mapping from ops to such names.

    Returns:
        A tensor of the shape, dtype and memory format of x.

    Statistics and arithmetic are float32 (float64 for float64 input). Backward, with dy' = dy·[y > 0] and
    x̂ = (x − mean)/sqrt(var + eps): dbias = Σdy', dweight = Σdy'·x̂, and
    dx = weight/sqrt(var + eps) · (dy' − dbias/n − x̂·dweight/n) over the n = B·H·W values of a channel.
    Over a process group n and the sums in dx are the group's; dweight and dbias are this process's own.
    All but torch save x and four vectors per channel; the ReLU mask is recomputed; the gradient cannot be
    differentiated again. Triton and native move 6 bytes an element forward and 10 backward in 16 bits (Triton's are
    counted; its speed is not measured on a GPU).

    Raises:
        TypeError: a tensor is not floating point, or of a dtype that an explicit backend does not compute in.
        ValueError: tensors on different devices, x is not four-dimensional, a per-channel vector has another length
            than C, or training is asked of a single value per channel (its variance is not defined).
        BackendUnavailable: an explicit backend that cannot run here.
    """
    vectors = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    check_floating("bn_relu", x=x, **vectors)
    check_device("bn_relu", "x", x, **vectors)
    if x.dim() != 4:
        raise ValueError(f"bn_relu: x must be (B, C, H, W), got {x.dim()} dimensions {tuple(x.shape)}")
    for name, vector in vectors.items():
        if vector.shape != x.shape[1:2]:
            raise ValueError(
                f"bn_relu: {name} must be ({x.shape[1]},) for x {tuple(x.shape)}, got {tuple(vector.shape)}"
            )
    count = x.numel() // x.shape[1]
    if training and count < 2:
        raise ValueError(f"bn_relu: training needs more than one value per channel, got x {tuple(x.shape)}")
    group = group_name(process_group) if training else ""
    norm = Norm(running_mean, running_var, weight, bias, training, eps, group)
    backend = resolve("bn_relu", backend, x.device.type, x.dtype, bool(group))
    check_dtype("bn_relu", backend, x.dtype)
    if backend == "torch":
        return library.bn_relu(x, norm, momentum)
    y, vectors = _forward(x, *norm, backend)
    if training:
        with torch.no_grad():
            update_running(running_mean, running_var, vectors, count * group_size(group), momentum)
    return y


@torch.library.custom_op("fastvitc::bn_relu", mutates_args=())
def _forward(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor,
    bias: Tensor,
    training: bool,
    eps: float,
    group: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    norm = Norm(running_mean, running_var, weight, bias, training, eps, group)
    y, vectors = _BACKENDS.module(backend).forward(x, norm)
    return y, vectors.to(accumulation_dtype(x.dtype))


@_forward.register_fake
def _(x, *_):
    return torch.empty_like(x), x.new_empty(4, x.shape[1], dtype=accumulation_dtype(x.dtype))


@torch.library.custom_op("fastvitc::bn_relu_backward", mutates_args=())
def _backward(
    dy: Tensor,
    x: Tensor,
    vectors: Tensor,
    weight: Tensor,
    bias: Tensor,
    training: bool,
    eps: float,
    group: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dbias = _BACKENDS.module(backend).backward(dy, x, vectors, training, eps, group)
    return laid_out_as(dx, x), copied_as(dweight, weight), copied_as(dbias, bias)


@_backward.register_fake
def _(dy, x, vectors, weight, bias, *_):
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)


def _setup_context(ctx, inputs, output) -> None:
    x, _, _, weight, bias, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[1], weight, bias)


def _autograd(ctx, dy: Tensor | None, _dvectors: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 9
    dx, dweight, dbias = _backward(dy, *ctx.saved_tensors, *ctx.options)
    return dx, None, None, dweight, dbias, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
