"""What one call moves through memory: kernels with their bytes and FLOPs, and what is saved for backward.

PyTorch's own (aten) kernels are counted as they are dispatched: each reads its inputs once and writes its outputs once.
Views, allocations and calls that return their argument count nothing.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Kernel:
    """One kernel of a call, in bytes and floating-point operations (a multiply-add is two).

    `distinct` counts each byte that is read once, and each that is written once: what crosses DRAM if the cache holds
    the rest. `requested` counts every access of every lane, which the caches serve; None where it is not known.
    """

    name: str
    distinct: float
    flops: float = 0.0
    requested: float | None = None


@dataclass
class Count:
    """Kernels in the order in which they ran, and the bytes of distinct storages saved for backward."""

    kernels: list[Kernel] = field(default_factory=list)
    saved: float = 0.0

    @property
    def distinct(self) -> float:
        return sum(kernel.distinct for kernel in self.kernels)

    @property
    def requested(self) -> float | None:
        """None unless known for every kernel."""
        parts = [kernel.requested for kernel in self.kernels]
        return None if None in parts else sum(parts)


_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted"}
_OVERWRITES = {"copy_", "fill_", "zero_", "normal_", "uniform_", "random_"}  # do not read what they change


def tensors(values: object) -> list[Tensor]:
    """The tensors among nested lists and dictionaries."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def nbytes(tensor: Tensor) -> int:
    """Bytes of the elements of a tensor; those that a stride of 0 repeats count once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * prod(size for size, stride in sizes if stride or not size)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def storages(values: object) -> list[torch.UntypedStorage]:
    """The distinct storages of the tensors in `values`, in order."""
    return list({_storage(t): t.untyped_storage() for t in tensors(values)}.values())


class AtenKernels(TorchDispatchMode):
    """Appends to `kernels` every aten kernel that runs under it, with those inside this project's ops."""

    def __init__(self, kernels: list[Kernel]) -> None:
        super().__init__()
        self.kernels = kernels

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "fastvitc":  # run the op's body in this mode, in which one op would be opaque
            with self:
                return torch._library.custom_ops.OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name in _ALLOCATIONS:
            return out
        inputs, outputs = tensors((args, kwargs)), tensors(out)
        changed = [
            value
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        written = tensors(changed)
        owned = {_storage(t) for t in inputs}
        written += [t for t in outputs if _storage(t) not in owned]
        if not written:
            return out
        skipped = {id(t) for t in tensors(changed)} if name in _OVERWRITES else set()
        read = {id(t): t for t in inputs if id(t) not in skipped}
        total = sum(map(nbytes, read.values())) + sum(map(nbytes, written))
        flops = flop_registry.get(func.overloadpacket)
        count = float(flops(*args, **kwargs, out_val=out)) if flops else 0.0
        self.kernels.append(Kernel(f"aten.{name}", total, count, total))
        return out


@contextmanager
def saved_for_backward(parameters: Iterable[Tensor]) -> Iterator[Callable[[], int]]:
    """Yields a function: bytes of the distinct storages saved so far, without those of `parameters`."""
    known = {_storage(p) for p in parameters}
    saved: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in known:
            saved[_storage(tensor)] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(storage.nbytes() for storage in saved.values())


def training_counts(
    module: torch.nn.Module, inputs: list[Tensor], counter: Callable[[list[Kernel]], object]
) -> tuple[Count, Count]:
    """Forward and backward of `module(*inputs)`; `counter(kernels)` is a context that appends what runs."""
    parameters = [*module.parameters(), *module.buffers()]
    forward, backward = Count(), Count()
    with saved_for_backward(parameters) as saved, counter(forward.kernels):
        out = module(*inputs)
        forward.saved = saved()
    dout = torch.ones_like(out)
    wanted = [t for t in (*inputs, *module.parameters()) if t.requires_grad]
    with counter(backward.kernels):
        torch.autograd.grad(out, wanted, dout, allow_unused=True)
    return forward, backward


def unrun_counts(
    module: torch.nn.Module, inputs: list[Tensor], counter: Callable[[list[Kernel]], object]
) -> tuple[Count, Count]:
    """`training_counts` on tensors without memory: kernels are called and nothing is computed."""
    mode = FakeTensorMode()
    with FakeCopyMode(mode):
        module = copy.deepcopy(module)
    inputs = [mode.from_tensor(t) for t in inputs]
    with mode:
        return training_counts(module, inputs, counter)


def eager_counts(module: torch.nn.Module, inputs: list[Tensor]) -> tuple[Count, Count]:
    """Forward and backward of a training module as PyTorch runs it op by op."""
    return unrun_counts(module, inputs, AtenKernels)


def per_image(count: Count, batch_size: int) -> Count:
    """A count of `batch_size` images as that of one."""
    kernels = [
        Kernel(
            k.name, k.distinct / batch_size, k.flops / batch_size, k.requested and k.requested / batch_size
        )
        for k in count.kernels
    ]
    return Count(kernels, count.saved / batch_size)
