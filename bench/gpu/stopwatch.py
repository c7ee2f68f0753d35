"""Times calls and reads their memory, on a GPU by its own events, elsewhere by the wall clock."""

import time
from collections.abc import Callable
from typing import Protocol

import torch

_FLUSHED = 256 << 20  # bytes, more than any L2 cache holds


class Stopwatch(Protocol):
    def seconds(self, call: Callable[[], object], repeats: int) -> list[float]:
        """The time of each of `repeats` calls."""

    def host(self, call: Callable[[], object]) -> float:
        """Seconds until a call has been handed to the idle device."""

    def allocated(self) -> int:
        """Bytes that tensors hold on the device."""

    def peak(self, call: Callable[[], object]) -> int:
        """The most bytes that tensors held during a call, beyond those before it."""


class EventStopwatch:
    """CUDA events around each call; its inputs are not in the L2 cache, which is overwritten before."""

    def __init__(self, device: torch.device) -> None:
        self._flushed = torch.empty(_FLUSHED, dtype=torch.uint8, device=device)

    def seconds(self, call: Callable[[], object], repeats: int) -> list[float]:
        pairs = []
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flushed.zero_()
            start.record()
            call()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return [1e-3 * start.elapsed_time(end) for start, end in pairs]

    def host(self, call: Callable[[], object]) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def allocated(self) -> int:
        torch.cuda.synchronize()  # which also brings up an error of what was run
        return torch.cuda.memory_allocated()

    def peak(self, call: Callable[[], object]) -> int:
        before = self.allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


class WallStopwatch:
    """For a dry run on a CPU, whose times and memory say nothing."""

    def seconds(self, call: Callable[[], object], repeats: int) -> list[float]:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return times

    def host(self, call: Callable[[], object]) -> float:
        return self.seconds(call, 1)[0]

    def allocated(self) -> int:
        return 0

    def peak(self, call: Callable[[], object]) -> int:
        call()
        return 0
