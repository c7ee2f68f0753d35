"""Multi-head self-attention on the packed projection."""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from fastvitc.kernels.attention import library
from fastvitc.kernels.choice.backends import Backends, Choice, resolve
from fastvitc.kernels.choice.checks import check_dtype, check_floating
from fastvitc.kernels.choice.dtypes import accumulation_dtype, autocast
from fastvitc.kernels.cpu.build import no_native
from fastvitc.kernels.gpu import no_triton


def _no_xformers(device_type: str) -> str | None:
    """Why xFormers' kernels cannot run on a device type, None when they can."""
    if find_spec("xformers") is None:
        return "xFormers is not installed (pip install 'fastvitc[xformers]')"
    return None if device_type == "cuda" else "xFormers' attention needs a GPU"


def _refused_by_xformers(_: str, dtype: torch.dtype, head_dim: int, gradient: bool) -> str | None:
    fits = dtype != torch.float64 and head_dim * dtype.itemsize % 16 == 0
    return None if fits else f"xFormers does not take {dtype} with heads of {head_dim}"


def _refused_by_triton(_: str, dtype: torch.dtype, head_dim: int, gradient: bool) -> str | None:
    return None if head_dim <= 128 else f"the Triton kernels take heads of up to 128, not {head_dim}"


def _refused_by_library(backend: str) -> Callable[..., str | None]:
    """The refusals of the one kernel of PyTorch's that a backend is."""
    return lambda *traits: library.unfit(backend, *traits)


_BACKENDS = Backends(
    op="attention",
    order={
        "cpu": ("native", "torch", "flash", "triton", "reference"),
        "default": ("torch", "flash", "efficient", "cudnn", "xformers", "triton", "reference"),
    },
    modules={
        **dict.fromkeys(library.KERNELS, "library"),
        "xformers": "xformers",
        "triton": "triton",
        "native": "native",
        "reference": "reference",
    },
    unavailable={
        "flash": library.no_flash,
        "efficient": library.no_efficient,
        "cudnn": library.no_cudnn,
        "xformers": _no_xformers,
        "triton": no_triton,
        "native": no_native,
    },
    refuses={
        **{name: _refused_by_library(name) for name, kernel in library.KERNELS.items() if kernel is not None},
        "xformers": _refused_by_xformers,
        "triton": _refused_by_triton,
    },
)


def attention(qkv: Tensor, num_heads: int, *, scale: float | None = None, backend: Choice = "auto") -> Tensor:
    """softmax(scale · Q Kᵀ) V for each head (Vaswani et al. 2017, equation 1), read from and written to packed tensors.

    Args:
        qkv: (B, T, 3·N·D), floating point: for each token all queries, then all keys, then all values, heads in
            order (the output of one fused projection). Any strides. Under autocast it is cast to the autocast dtype.
        num_heads: N.
        scale: factor on the scores; 1/sqrt(D) by default.
        backend: "auto", "torch" (`scaled_dot_product_attention`), "flash", "efficient" or "cudnn" (that one kernel
            of it), "xformers", "triton", "native" (this library's CPU kernels) or "reference"; or a mapping from ops
            to such names.

    Returns:
        (B, T, N·D) in the dtype of `qkv`, heads in order.

    The sums run in float32 (float64 for float64 input). Backward, with P = exp(scale·QKᵀ − lse):
    dV = Pᵀ dO, dS = scale · P ∘ (dO Vᵀ − rowsum(dO ∘ O)), dQ = dS K, dK = dSᵀ Q, returned as one packed gradient.
    All but PyTorch's save qkv, the output and the row log-sum-exp (B, N, T); P is recomputed, by
    the reference in memory of O(B·N·T²). The Triton kernels read the packed projection and write the packed gradient
    in place: forward and backward move 1.005 times the bytes of reading qkv, out and dout and writing out and dqkv
    once (1GF to 36GF; counted, `python -m bench.traffic`). Their speed is not measured on a GPU. The native kernels
    compute one (image, head) at a time in a core's cache; `bench/LOG.md` has their speed.

    Raises:
        TypeError: `qkv` is not floating point, or of a dtype that an explicit backend does not compute in.
        ValueError: `qkv` is not three-dimensional, or its last dimension is not a multiple of 3·num_heads.
        BackendUnavailable: an explicit backend that cannot run here or does not take this head size.
    """
    check_floating("attention", qkv=qkv)
    if qkv.dim() != 3:
        raise ValueError(
            f"attention: qkv must be (B, T, 3·N·D), got {qkv.dim()} dimensions {tuple(qkv.shape)}"
        )
    if num_heads < 1 or not qkv.shape[-1] or qkv.shape[-1] % (3 * num_heads):
        raise ValueError(
            f"attention: the last dimension of qkv must be a multiple of 3·num_heads, got {qkv.shape[-1]} "
            f"for num_heads={num_heads}"
        )
    qkv = autocast(qkv)
    head_dim = qkv.shape[-1] // (3 * num_heads)
    if scale is None:
        scale = head_dim**-0.5
    gradient = torch.is_grad_enabled() and qkv.requires_grad
    name = resolve("attention", backend, qkv.device.type, qkv.dtype, traits=(head_dim, gradient))
    check_dtype("attention", name, qkv.dtype)
    if name in library.KERNELS:
        return library.attention(qkv, num_heads, scale, name)
    return _forward(qkv, num_heads, scale, name)[0]


@torch.library.custom_op("fastvitc::attention", mutates_args=())
def _forward(qkv: Tensor, num_heads: int, scale: float, backend: str) -> tuple[Tensor, Tensor]:
    with torch.autocast(qkv.device.type, enabled=False):
        return _BACKENDS.module(backend).forward(qkv.contiguous(), num_heads, scale)


@_forward.register_fake
def _(qkv: Tensor, num_heads: int, scale: float, backend: str) -> tuple[Tensor, Tensor]:
    batch, tokens, width = qkv.shape
    lse = qkv.new_empty(batch, num_heads, tokens, dtype=accumulation_dtype(qkv.dtype))
    return qkv.new_empty(batch, tokens, width // 3), lse


@torch.library.custom_op("fastvitc::attention_backward", mutates_args=())
def _backward(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, num_heads: int, scale: float, backend: str
) -> Tensor:
    with torch.autocast(qkv.device.type, enabled=False):
        return _BACKENDS.module(backend).backward(dout, qkv.contiguous(), out, lse, num_heads, scale)


@_backward.register_fake
def _(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, num_heads: int, scale: float, backend: str
) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _setup_context(ctx, inputs, output) -> None:
    qkv, ctx.num_heads, ctx.scale, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, *output)


def _autograd(ctx, dout: Tensor | None, _dlse: None) -> tuple[Tensor | None, None, None, None]:
    if dout is None:
        return None, None, None, None
    qkv, out, lse = ctx.saved_tensors
    return _backward(dout, qkv, out, lse, ctx.num_heads, ctx.scale, ctx.backend), None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
