"""The residual sum followed by layer normalisation, as one op."""

import torch
from torch import Tensor

from fastvitc.kernels.add_layer_norm import library
from fastvitc.kernels.choice.backends import Backends, Choice, resolve
from fastvitc.kernels.choice.checks import check_device, check_dtype, check_floating
from fastvitc.kernels.choice.dtypes import accumulation_dtype, autocast_dtype
from fastvitc.kernels.cpu.build import no_native

_BACKENDS = Backends(
    op="add_layer_norm",
    order={"cpu": ("native", "torch", "reference"), "default": ("torch", "reference")},
    modules={"torch": "library", "native": "native", "reference": "reference"},
    unavailable={"native": no_native},
)


def add_layer_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    backend: Choice = "auto",
) -> tuple[Tensor, Tensor]:
    """total = x + branch, and weight · (total − mean)/sqrt(var + eps) + bias over its last dimension (Ba et al. 2016).

    Args:
        x: (..., C), floating point: the residual stream. Any strides.
        branch: of x's shape, or None for nothing to add.
        weight, bias: (C,), float; they may be wider than x.
        backend: "auto", "torch" (`+` and `layer_norm`), "native" (a CPU kernel) or "reference"; or a mapping from ops
            to such names. There is no Triton kernel: torch.compile fuses the two into one on a GPU.

    Returns:
        total, in the dtype that x and branch (and the next) promote to; without a branch x itself. And the normalised
        one, in the dtype of x or under autocast in the autocast dtype, to which the layer behind it would cast it.

    Mean and biased variance are those of total as it is stored, two-pass; arithmetic is float32 (float64 for float64
    input). Backward, with x̂ the normalised total, g = dy·weight and means over the C values:
    dx = dbranch = dtotal + (g − mean(g) − x̂·mean(g·x̂))/sqrt(var + eps), dweight = Σdy·x̂, dbias = Σdy.
    Native saves total and two float32 values per row. With x in float32 and the rest in 16 bits it moves 12 bytes an
    element forward and 16 backward. The gradient cannot be differentiated again but by the backend torch.

    Raises:
        TypeError: a tensor is not floating point, or of a dtype that an explicit backend does not compute in.
        ValueError: tensors on different devices, or shapes that do not fit.
        BackendUnavailable: an explicit backend that cannot run here.
    """
    others = {"weight": weight, "bias": bias} | ({} if branch is None else {"branch": branch})
    check_floating("add_layer_norm", x=x, **others)
    check_device("add_layer_norm", "x", x, **others)
    if branch is not None and branch.shape != x.shape:
        raise ValueError(
            f"add_layer_norm: branch must have the shape of x, {tuple(x.shape)}, got {tuple(branch.shape)}"
        )
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector.shape != x.shape[-1:]:
            raise ValueError(
                f"add_layer_norm: {name} must be (C,) for x (..., C) {tuple(x.shape)}, got {tuple(vector.shape)}"
            )
    dtype = autocast_dtype(x)
    x = x.to(torch.promote_types(x.dtype, dtype))
    if branch is not None:
        x = x.to(torch.promote_types(x.dtype, branch.dtype))
        branch = branch if branch.dtype == dtype else branch.to(x.dtype)
    name = resolve("add_layer_norm", backend, x.device.type, x.dtype)
    check_dtype("add_layer_norm", name, x.dtype)
    if name == "torch":
        return library.add_layer_norm(x, branch, weight, bias, eps, dtype)
    total, y, _ = _forward(x, branch, weight, bias, eps, dtype, name)
    return x if branch is None else total, y


@torch.library.custom_op("fastvitc::add_layer_norm", mutates_args=())
def _forward(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(total, empty without a branch; the normalised in `dtype`; mean and 1/sqrt(var + eps) of each row (..., 2))."""
    with torch.autocast(x.device.type, enabled=False):
        branch = None if branch is None else branch.contiguous()
        return _BACKENDS.module(backend).forward(x.contiguous(), branch, weight, bias, eps, dtype)


@_forward.register_fake
def _(x, branch, weight, bias, eps, dtype, backend):
    total = x.new_empty(0) if branch is None else x.new_empty(x.shape)
    moments = x.new_empty(*x.shape[:-1], 2, dtype=accumulation_dtype(x.dtype))
    return total, x.new_empty(x.shape, dtype=dtype), moments


@torch.library.custom_op("fastvitc::add_layer_norm_backward", mutates_args=())
def _backward(
    dtotal: Tensor | None,
    dy: Tensor,
    total: Tensor,
    moments: Tensor,
    weight: Tensor,
    bias: Tensor,
    branch_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dbranch where its dtype is another, else empty, dweight, dbias)."""
    dtotal = None if dtotal is None else dtotal.contiguous()
    return _BACKENDS.module(backend).backward(
        dtotal, dy.contiguous(), total.contiguous(), moments, weight, bias, branch_dtype
    )


@_backward.register_fake
def _(dtotal, dy, total, moments, weight, bias, branch_dtype, backend):
    dx = total.new_empty(total.shape)
    dbranch = total.new_empty(0 if branch_dtype == total.dtype else total.shape, dtype=branch_dtype)
    return dx, dbranch, torch.empty_like(weight), torch.empty_like(bias)


def _setup_context(ctx, inputs, output) -> None:
    x, branch, weight, bias, _, _, ctx.backend = inputs
    total, _, moments = output
    ctx.branch_dtype = None if branch is None else branch.dtype
    ctx.mark_non_differentiable(moments)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x if branch is None else total, moments, weight, bias)


def _autograd(ctx, dtotal: Tensor | None, dy: Tensor | None, _):
    """Gradients of the inputs of `_forward`."""
    total, moments, weight, bias = ctx.saved_tensors
    if dy is None:
        dbranch = None if dtotal is None or ctx.branch_dtype is None else dtotal.to(ctx.branch_dtype)
        return dtotal, dbranch, *(None,) * 5
    if ctx.branch_dtype is None:
        dtotal = None
    dx, dbranch, dweight, dbias = _backward(
        dtotal, dy, total, moments, weight, bias, ctx.branch_dtype or total.dtype, ctx.backend
    )
    if ctx.branch_dtype is None:
        dbranch = None
    elif ctx.branch_dtype == dx.dtype:
        dbranch = dx
    return dx, dbranch, dweight, dbias, *(None,) * 3


_forward.register_autograd(_autograd, setup_context=_setup_context)
