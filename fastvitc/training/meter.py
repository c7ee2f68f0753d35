"""Measures a training epoch without waiting for the device, except where a figure is read; times in words."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from fastvitc.training.process import Process


class Meter:
    """Loss, images per second and the share of time spent waiting for data, over an epoch.

    Args:
        images_per_step: over all processes.
        process: this process.
    """

    def __init__(self, images_per_step: int, process: Process) -> None:
        self._images_per_step, self._process = images_per_step, process
        self._loss: Tensor | None = None
        self._losses = 0
        self._start, self._waited, self._steps = time.perf_counter(), 0.0, 0

    def state(self) -> dict[str, Any]:
        """This process's sum of losses, and how many they are."""
        return {"loss": self._loss, "losses": self._losses}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave; times start anew."""
        self._loss, self._losses = state["loss"], state["losses"]
        if self._loss is not None:
            self._loss = self._loss.to(self._process.device)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time in here is waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def add(self, loss: Tensor) -> None:
        """Count a step and its loss, a 0-d tensor."""
        self._loss = loss if self._loss is None else self._loss + loss
        self._losses += 1
        self._steps += 1

    def restart(self) -> float:
        """Forget the time and the steps so far, as after a first step that compiles; return that time."""
        now = time.perf_counter()
        elapsed = now - self._start
        self._start, self._waited, self._steps = now, 0.0, 0
        return elapsed

    def mean_loss(self) -> float:
        """Mean loss of the epoch so far over all processes; waits for the device and for them."""
        if self._loss is None:
            return float("nan")
        return self._process.sum(self._loss.clone()).item() / (self._losses * self._process.world_size)

    def rates(self) -> tuple[float, float]:
        """(images per second over all processes, share of the time spent waiting for data)."""
        elapsed = max(time.perf_counter() - self._start, 1e-9)
        return self._steps * self._images_per_step / elapsed, self._waited / elapsed


def duration(seconds: float) -> str:
    """A time in the two units that tell it best: "12 s", "3 min 20 s", "2 h 5 min", "4 d 6 h"."""
    units = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
    rest, parts = round(seconds), []
    for size, name in units:
        count, rest = divmod(rest, size)
        if count or parts or size == 1:
            parts.append((count, name))
    return " ".join(f"{count} {name}" for count, name in parts[:2] if count or len(parts) == 1)
