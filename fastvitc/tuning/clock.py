"""The time that a call takes on a device."""

import time
from collections.abc import Callable

import torch


def seconds(call: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Seconds of one call, the mean of `repeats` in a row; on a GPU until its work is done."""
    _synchronise(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    _synchronise(device)
    return (time.perf_counter() - start) / repeats


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
