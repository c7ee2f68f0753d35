"""Counts the bytes and FLOPs of Triton kernels: the loads, stores and dot products that the interpreter runs.

A small batch is run. A large one is only planned: its launchers run on tensors without memory, and each launch touches
the shares of its storages that the same launch of the small batch did. So parts and partial results of which a launcher
makes more for a large batch count as they are.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime.interpreter import InterpreterBuilder

from bench.counting import AtenKernels, Count, Kernel, storages, training_counts, unrun_counts
from fastvitc.kernels.gpu.triton import launches_to

Build = Callable[[int], tuple[nn.Module, list[Tensor]]]  # of a batch size

_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class _Touched:
    """Which bytes of a launch's storages were touched, and how many were asked for in all."""

    def __init__(self, storages: list[torch.UntypedStorage]) -> None:
        storages = sorted((s for s in storages if s.nbytes()), key=lambda s: s.data_ptr())
        self.starts = np.array([s.data_ptr() for s in storages], np.int64)
        self.maps = [np.zeros(-(-s.nbytes() // 8) * 8, bool) for s in storages]
        self.requested = 0

    def touch(self, addresses: np.ndarray, size: int) -> None:
        """Elements of `size` bytes at the addresses, all in one storage."""
        if not addresses.size:
            return
        addresses = addresses.astype(np.int64)
        self.requested += addresses.size * size
        i = int(self.starts.searchsorted(addresses.min(), "right")) - 1
        if i < 0 or addresses.max() + size > self.starts[i] + self.maps[i].size:
            raise IndexError("a kernel reaches outside its tensors")
        words = self.maps[i].view(_WORDS[size])
        words[(addresses - self.starts[i]) // size] = int.from_bytes(b"\x01" * size, "little")

    def bytes_of(self, storage: torch.UntypedStorage) -> int:
        """Bytes touched of one storage."""
        found = np.flatnonzero(self.starts == storage.data_ptr())
        return sum(int(np.count_nonzero(self.maps[i])) for i in found)


@dataclass(frozen=True)
class Launch(Kernel):
    """A kernel that ran. `touched`: bytes read plus bytes written of each storage of its arguments, over its size."""

    touched: tuple[float, ...] = ()


class _Watch:
    """Replaces the interpreter's memory and matrix instructions while one kernel runs."""

    def __init__(self, storages: list[torch.UntypedStorage]) -> None:
        self.read, self.written, self.flops = _Touched(storages), _Touched(storages), 0

    @contextmanager
    def watched(self) -> Iterator[None]:
        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
        dot = InterpreterBuilder.create_dot

        def counted_load(builder, pointers, mask, *rest, **options):
            self._touch(self.read, pointers, mask)
            return load(builder, pointers, mask, *rest, **options)

        def counted_store(builder, pointers, value, mask, *rest, **options):
            self._touch(self.written, pointers, mask)
            return store(builder, pointers, value, mask, *rest, **options)

        def counted_dot(builder, a, b, *rest, **options):
            self.flops += 2 * a.data.size * b.data.shape[-1]
            return dot(builder, a, b, *rest, **options)

        def refused(*_):
            raise NotImplementedError("atomics are not counted")

        with patch.multiple(
            InterpreterBuilder,
            create_masked_load=counted_load,
            create_masked_store=counted_store,
            create_dot=counted_dot,
            create_atomic_rmw=refused,
            create_atomic_cas=refused,
        ):
            yield

    @staticmethod
    def _touch(touched: _Touched, pointers, mask) -> None:
        inside = np.broadcast_to(mask.data, pointers.data.shape)
        touched.touch(pointers.data[inside], pointers.get_element_ty().primitive_bitwidth // 8)

    def launch(self, name: str, storages: list[torch.UntypedStorage]) -> Launch:
        moved = [self.read.bytes_of(s) + self.written.bytes_of(s) for s in storages]
        shares = tuple(m / max(s.nbytes(), 1) for m, s in zip(moved, storages, strict=True))
        return Launch(name, sum(moved), self.flops, self.read.requested + self.written.requested, shares)


def run_counted(kernel, grid: tuple[int, ...], *args: object, **options: object) -> Launch:
    """Run a kernel in the interpreter and count it."""
    owned = storages(args)
    watch = _Watch(owned)
    with _disable_current_modes(), watch.watched():  # PyTorch calls of the interpreter itself do not count
        kernel[grid](*args, **options)
    return watch.launch(kernel.fn.__name__, owned)


@contextmanager
def interpreted_kernels(kernels: list[Kernel], architecture: str) -> Iterator[None]:
    """Append to `kernels` the Triton kernels, configured as on `architecture`, and the aten kernels that run."""

    def count(*args: object, **options: object) -> None:
        kernels.append(run_counted(*args, **options))

    with launches_to(count, architecture), AtenKernels(kernels):
        yield


@contextmanager
def _planned_kernels(
    kernels: list[Kernel], architecture: str, small: list[Kernel], scale: float
) -> Iterator[None]:
    """Append what runs on a batch `scale` times as large as that of which the kernels were counted."""
    known: dict[str, list[Launch]] = defaultdict(list)
    for kernel in small:
        if isinstance(kernel, Launch):
            known[kernel.name].append(kernel)

    def plan(kernel, grid: tuple[int, ...], *args: object, **options: object) -> None:
        name = kernel.fn.__name__
        if not known[name]:
            raise ValueError(f"{name} runs on the large batch only: count a larger one")
        same = known[name]
        launch = same.pop(0) if len(same) > 1 else same[0]  # further launches are like the last
        sizes = (storage.nbytes() for storage in storages(args))
        moved = sum(share * size for share, size in zip(launch.touched, sizes, strict=True))
        kernels.append(Kernel(name, moved, scale * launch.flops, scale * launch.requested))

    with launches_to(plan, architecture), AtenKernels(kernels):
        yield


def triton_counts(build: Build, architecture: str, run: int, planned: int) -> tuple[Count, Count]:
    """Forward and backward of a batch of `planned` images from one of `run`, which is interpreted.

    Raises:
        ValueError: the larger batch launches a kernel that the smaller one does not.
    """
    small = training_counts(*build(run), lambda kernels: interpreted_kernels(kernels, architecture))
    each = iter(small)

    def plan(kernels: list[Kernel]) -> AbstractContextManager[None]:
        return _planned_kernels(kernels, architecture, next(each).kernels, planned / run)

    return unrun_counts(*build(planned), plan)
