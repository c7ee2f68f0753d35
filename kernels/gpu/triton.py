"""What the Triton kernels share: where they run, and loads and stores that stay exact under the interpreter."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Whether kernels run in Triton's interpreter, on the CPU (TRITON_INTERPRET=1 before the first import).
INTERPRET = triton.knobs.runtime.interpret

#: log2(e): the kernels take powers of two.
LOG2E = tl.constexpr(1.4426950408889634)

Launch = Callable[..., None]


def _run(kernel, grid: tuple[int, ...], *args: object, **options: object) -> None:
    kernel[grid](*args, **options)


_launch: Launch = _run
_architecture: str | None = None


def launch(kernel, grid: tuple[int, ...], *args: object, **options: object) -> None:
    """Start a kernel on the device of its first tensor, wherever the current device is.

    `maxnreg`, registers that a thread may use, is for NVIDIA's compiler alone.
    """
    device = next(a.device for a in args if isinstance(a, Tensor))
    if device.type == "cpu" or torch.version.hip is not None:
        options.pop("maxnreg", None)
    if device.type == "cuda":
        with torch.cuda.device(device):
            _launch(kernel, grid, *args, INTERPRET=False, **options)
    else:
        _launch(kernel, grid, *args, INTERPRET=INTERPRET, **options)


def architecture(device: torch.device) -> str:
    """The instruction set that kernels are compiled for: "sm_90", "gfx942", or "interpreter"."""
    if _architecture is not None:
        return _architecture
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


@contextmanager
def launches_to(target: Launch, architecture: str) -> Iterator[None]:
    """Hand launches to `target` instead of a device, as if on an architecture: to compile or to count them."""
    global _launch, _architecture
    before = _launch, _architecture
    _launch, _architecture = target, architecture
    try:
        yield
    finally:
        _launch, _architecture = before


@triton.jit
def rounded(x, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """float32 x rounded to `dtype`, as an operand of a dot product.

    The interpreter cannot compute in bfloat16 and truncates what it converts to it. There the rounded value stays in
    float32, in which products of bfloat16 and float16 are exact: what the tensor cores do.
    """
    if not INTERPRET:
        x = x.to(dtype)
    elif dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536  # to nearest, ties to even
        x = bits.to(tl.float32, bitcast=True)
    else:
        x = x.to(dtype).to(tl.float32)
    return x


@triton.jit
def load(pointers, mask, INTERPRET: tl.constexpr):
    """Masked load, zero outside the mask; see `rounded` for the interpreter."""
    x = tl.load(pointers, mask=mask, other=0.0)
    if INTERPRET:
        x = x.to(tl.float32)
    return x


@triton.jit
def store(pointers, x, mask, INTERPRET: tl.constexpr):
    """Masked store of float32 x, rounded to nearest in the dtype of the pointers."""
    dtype: tl.constexpr = pointers.dtype.element_ty
    tl.store(pointers, rounded(x, dtype, INTERPRET).to(dtype), mask=mask)


@triton.jit
def relu(x):
    """max(x, 0); NaN stays NaN, so that a diverged run shows."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def row_vector(vectors, row: tl.constexpr, columns, known, C: tl.constexpr):
    """A row of a (·, C) tensor of vectors, (1, columns), to be multiplied with a tile; zero where not `known`."""
    return tl.load(vectors + row * C + columns, mask=known, other=0.0)[None, :]
