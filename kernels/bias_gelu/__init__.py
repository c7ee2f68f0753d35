"""A bias followed by GELU, as one op."""

import torch
from torch import Tensor

from fastvitc.kernels.bias_gelu import library
from fastvitc.kernels.choice.backends import Backends, Choice, resolve
from fastvitc.kernels.choice.checks import check_device, check_dtype, check_floating
from fastvitc.kernels.choice.dtypes import autocast
from fastvitc.kernels.cpu.build import no_native

_BACKENDS = Backends(
    op="bias_gelu",
    order={"cpu": ("native", "torch", "reference"), "default": ("torch", "reference")},
    modules={"torch": "library", "native": "native", "reference": "reference"},
    unavailable={"native": no_native},
)


def bias_gelu(x: Tensor, bias: Tensor, *, backend: Choice = "auto") -> Tensor:
    """gelu(x + bias), with gelu(v) = v·Φ(v) and Φ the standard normal distribution (Hendrycks & Gimpel 2016).

    Args:
        x: (..., C), floating point: a linear layer's output without its bias. Any strides. Under autocast it is cast to
            the autocast dtype.
        bias: (C,), float; it may be wider than x.
        backend: "auto", "torch" (`+` and `gelu`), "native" (a CPU kernel) or "reference"; or a mapping from ops to such
            names. There is no Triton kernel: torch.compile fuses the two into one on a GPU.

    Returns:
        A tensor of the shape and dtype of x.

    The exact form, in float32 (float64 for float64 input). Backward: dx = dy·(Φ(v) + v·φ(v)) with v = x + bias and φ
    the normal density, dbias = Σdx in the same pass. Native saves x; it moves 4 bytes an element forward and 6 backward
    in 16 bits. The gradient cannot be differentiated again but by the backend torch.

    Raises:
        TypeError: a tensor is not floating point, or of a dtype that an explicit backend does not compute in.
        ValueError: tensors on different devices, or a bias of another length than C.
        BackendUnavailable: an explicit backend that cannot run here.
    """
    check_floating("bias_gelu", x=x, bias=bias)
    check_device("bias_gelu", "x", x, bias=bias)
    if bias.shape != x.shape[-1:]:
        raise ValueError(
            f"bias_gelu: bias must be (C,) for x (..., C) {tuple(x.shape)}, got {tuple(bias.shape)}"
        )
    x = autocast(x)
    name = resolve("bias_gelu", backend, x.device.type, x.dtype)
    check_dtype("bias_gelu", name, x.dtype)
    if name == "torch":
        return library.bias_gelu(x, bias)
    return _forward(x, bias, name)


@torch.library.custom_op("fastvitc::bias_gelu", mutates_args=())
def _forward(x: Tensor, bias: Tensor, backend: str) -> Tensor:
    return _BACKENDS.module(backend).forward(x.contiguous(), bias)


@_forward.register_fake
def _(x, bias, backend):
    return x.new_empty(x.shape)


@torch.library.custom_op("fastvitc::bias_gelu_backward", mutates_args=())
def _backward(dy: Tensor, x: Tensor, bias: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return _BACKENDS.module(backend).backward(dy.contiguous(), x.contiguous(), bias)


@_backward.register_fake
def _(dy, x, bias, backend):
    return x.new_empty(x.shape), torch.empty_like(bias)


def _setup_context(ctx, inputs, output) -> None:
    x, bias, ctx.backend = inputs
    ctx.save_for_backward(x, bias)


def _autograd(ctx, dy: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_backward(dy, *ctx.saved_tensors, ctx.backend), None


_forward.register_autograd(_autograd, setup_context=_setup_context)
