"""Counts the bytes and FLOPs of Triton kernels: the loads, stores and dot products that the interpreter runs."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime.interpreter import InterpreterBuilder

from bench.counting import AtenKernels, Kernel
from fastvitc.kernels._triton import launches_to

_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class _Touched:
    """Which bytes of a launch's storages were touched, and how many were asked for in all."""

    def __init__(self, storages: list[torch.UntypedStorage]) -> None:
        storages = sorted((s for s in storages if s.nbytes()), key=lambda s: s.data_ptr())
        self.starts = np.array([s.data_ptr() for s in storages], np.int64)
        self.maps = [np.zeros(-(-s.nbytes() // 8) * 8, bool) for s in storages]
        self.requested = 0

    def touch(self, addresses: np.ndarray, size: int) -> None:
        """Elements of `size` bytes at the addresses."""
        if not addresses.size:
            return
        addresses = addresses.astype(np.int64)
        self.requested += addresses.size * size
        first, last = self.starts.searchsorted((addresses.min(), addresses.max()), "right") - 1
        for i in range(first, last + 1):
            offsets = addresses - self.starts[i]
            if first != last:
                offsets = offsets[(offsets >= 0) & (addresses < self._end(i))]
            words = self.maps[i].view(_WORDS[size])
            words[offsets // size] = int.from_bytes(b"\x01" * size, "little")

    def _end(self, i: int) -> int:
        return int(self.starts[i]) + self.maps[i].size

    @property
    def distinct(self) -> int:
        return sum(int(np.count_nonzero(touched)) for touched in self.maps)


class _Launch:
    """Replaces the interpreter's memory and matrix instructions while one kernel runs."""

    def __init__(self, storages: list[torch.UntypedStorage]) -> None:
        self.read, self.written, self.flops = _Touched(storages), _Touched(storages), 0

    @contextmanager
    def watched(self) -> Iterator[None]:
        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
        dot, atomic = InterpreterBuilder.create_dot, InterpreterBuilder.create_atomic_rmw

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

        InterpreterBuilder.create_masked_load = counted_load
        InterpreterBuilder.create_masked_store = counted_store
        InterpreterBuilder.create_dot = counted_dot
        InterpreterBuilder.create_atomic_rmw = refused
        try:
            yield
        finally:
            InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = load, store
            InterpreterBuilder.create_dot, InterpreterBuilder.create_atomic_rmw = dot, atomic

    @staticmethod
    def _touch(touched: _Touched, pointers, mask) -> None:
        inside = np.broadcast_to(mask.data, pointers.data.shape)
        touched.touch(pointers.data[inside], pointers.get_element_ty().primitive_bitwidth // 8)

    def kernel(self, name: str) -> Kernel:
        distinct = self.read.distinct + self.written.distinct
        return Kernel(name, distinct, self.flops, self.read.requested + self.written.requested)


def run_counted(kernel, grid: tuple[int, ...], *args: object, **options: object) -> Kernel:
    """Run a kernel in the interpreter and count it."""
    storages = {a.untyped_storage().data_ptr(): a.untyped_storage() for a in args if isinstance(a, Tensor)}
    launch = _Launch(list(storages.values()))
    with _disable_current_modes(), launch.watched():  # PyTorch calls of the interpreter itself do not count
        kernel[grid](*args, **options)
    return launch.kernel(kernel.fn.__name__)


@contextmanager
def interpreted_kernels(kernels: list[Kernel], architecture: str) -> Iterator[None]:
    """Append to `kernels` the Triton kernels, configured as on `architecture`, and the aten kernels that run."""

    def count(*args: object, **options: object) -> None:
        kernels.append(run_counted(*args, **options))

    with launches_to(count, architecture), AtenKernels(kernels):
        yield
