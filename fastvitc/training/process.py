"""One process or many: rank, device and the few collectives that training needs, after torchrun's environment."""

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastvitc.errors import FastvitcError, Interrupted, UsageError

T = TypeVar("T")
#: How long a message waits for another process before the run ends, and how long where the main one has work to do
#: that may take hours: it indexes images and measures backends.
_SOON, _LATE = timedelta(minutes=10), timedelta(hours=12)


@dataclass(frozen=True)
class Process:
    """This process's place in the run."""

    rank: int
    world_size: int
    device: torch.device
    control: dist.ProcessGroup | None = None  # messages between the hosts, which no device has to wait for
    patient: dist.ProcessGroup | None = None  # the same, for what may take hours
    local_rank: int = 0  # among the processes of this machine

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Make each tensor its mean over all processes, in place, in one message for each dtype."""
        if self.world_size == 1:
            return
        by_dtype: dict[torch.dtype, list[Tensor]] = defaultdict(list)
        for tensor in tensors:
            by_dtype[tensor.dtype].append(tensor)
        for group in by_dtype.values():
            flat = self.sum(torch.cat([tensor.flatten() for tensor in group])).div_(self.world_size)
            parts = flat.split([tensor.numel() for tensor in group])
            for tensor, part in zip(group, parts, strict=True):
                tensor.copy_(part.view(tensor.shape))

    def average_statistics(self, module: nn.Module) -> None:
        """Make BatchNorm's running statistics their means over all processes."""
        norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.average(statistic for norm in norms for statistic in (norm.running_mean, norm.running_var))

    def gather(self, value: T, *, late: bool = False) -> list[T]:
        """Each process's value, on every process, in the order of the ranks; `late` where one may come hours later."""
        values: list[T] = [value]
        if self.world_size > 1:
            values *= self.world_size
            dist.all_gather_object(values, value, group=self.patient if late else self.control)
        return values

    def agree(self, step: Callable[[], T]) -> T | None:
        """What `step` gives on the main process, None elsewhere; an error there ends every process."""
        result, error = None, None
        if self.is_main:
            try:
                result = step()
            except Exception as raised:
                error = raised
        if self.share(error is not None):
            raise error or FastvitcError("the main process failed; its message says why")
        return result

    def share(self, value: T | None) -> T:
        """The main process's value, on every process; others give None."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values, src=0, group=self.patient)
        return cast(T, values[0])


class Poll:
    """Asks all processes what they want, once a step: the largest of their requests holds for all.

    With several processes the answer is to the requests of the step before, so that no step waits for the network.
    """

    def __init__(self, process: Process) -> None:
        self._process = process
        self._asked: tuple[Tensor, dist.Work] | None = None

    def __call__(self, request: int) -> int:
        """The largest request of all processes; every process must ask equally often."""
        if self._process.world_size == 1:
            return request
        answer = self.last()
        tensor = torch.tensor(request)
        work = dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._process.control, async_op=True)
        self._asked = tensor, work
        return answer

    def last(self) -> int:
        """The answer to the requests that are still on their way; 0 where there are none."""
        if self._asked is None:
            return 0
        (tensor, work), self._asked = self._asked, None
        work.wait()
        return int(tensor)


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
    if device.index is not None and device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise UsageError(
            f"device {requested!r} was asked for, but there are {torch.cuda.device_count()} CUDA devices"
        )
    return device


def _of_this_start(store: dist.Store) -> dist.Store:
    """The store's part for these processes.

    torchrun keeps its store when it starts all of them again, and the addresses of those that have ended must not be
    taken for theirs. On several machines the count of starts may differ.
    """
    alone = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    return dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if alone else "0", store)


@contextmanager
def process_group(device: str = "auto") -> Iterator[Process]:
    """Join the process group that torchrun describes, if any, and leave it at the end."""
    picked = pick_device(device)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1 and "RANK" not in os.environ:
        raise UsageError("WORLD_SIZE is set, but not RANK; start several processes with torchrun")
    if picked.type == "cuda":
        picked = torch.device("cuda", int(os.environ.get("LOCAL_RANK", picked.index or 0)))
        torch.cuda.set_device(picked)
    if world_size == 1:
        yield Process(0, 1, picked)
        return
    store, rank, _ = next(dist.rendezvous("env://", timeout=_SOON))
    backend = "nccl" if picked.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=_of_this_start(store), rank=rank, world_size=world_size, timeout=_SOON
    )
    control, patient = (dist.new_group(backend="gloo", timeout=timeout) for timeout in (_SOON, _LATE))
    try:
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        yield Process(dist.get_rank(), world_size, picked, control, patient, local_rank)
    except Interrupted:  # on all processes
        dist.destroy_process_group()
        raise
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        raise FastvitcError(
            f"another process of the run ended or cannot be reached: {reason}. What was saved before is whole; "
            "start all processes again with --resume"
        ) from error
    # After another error the others may never come: leaving together would wait for them.
    dist.destroy_process_group()
