"""One process or many: rank, device and the few collectives that training needs, after torchrun's environment."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fastvitc.errors import UsageError


@dataclass(frozen=True)
class Process:
    """This process's place in the run."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def average_buffers(self, module: torch.nn.Module) -> None:
        """Make floating-point buffers (running statistics) their mean over all processes."""
        if self.world_size > 1:
            for buffer in module.buffers():
                if buffer.is_floating_point():
                    self.sum(buffer).div_(self.world_size)

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()


def pick_device(requested: str) -> torch.device:
    """ "auto" takes a CUDA device where there is one; UsageError when an explicit one is not there."""
    if requested == "auto":
        requested = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(requested)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UsageError(f"unknown device {requested!r}; use auto, cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            f"device {requested!r} was asked for, but PyTorch finds no CUDA device here; use --device cpu"
        )
    return device


@contextmanager
def process_group(device: str = "auto") -> Iterator[Process]:
    """Join the process group that torchrun describes, if any, and leave it at the end."""
    picked = pick_device(device)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if picked.type == "cuda":
        picked = torch.device("cuda", int(os.environ.get("LOCAL_RANK", picked.index or 0)))
        torch.cuda.set_device(picked)
    if world_size == 1:
        yield Process(0, 1, picked)
        return
    dist.init_process_group("nccl" if picked.type == "cuda" else "gloo")
    try:
        yield Process(dist.get_rank(), world_size, picked)
    finally:
        dist.destroy_process_group()
