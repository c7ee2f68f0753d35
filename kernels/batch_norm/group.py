"""Statistics over a process group. Every process of it holds the same number of values.

Ops know a group by its name; "" means this process alone.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from fastvitc.kernels.choice.backends import BackendUnavailable, Choice, no_triton, requested, resolve

_SHARING = ("triton", "reference")  # backends that share statistics


@torch.compiler.assume_constant_result
def group_name(process_group: dist.ProcessGroup | None) -> str:
    """The name that ops know a process group by; "" for None."""
    return "" if process_group is None else process_group.group_name


@torch.compiler.assume_constant_result
def group_size(group: str) -> int:
    """How many processes the group has."""
    return dist.get_world_size(_resolve_process_group(group)) if group else 1


@torch.compiler.assume_constant_result
def synchronizing(op: str, backend: Choice, device_type: str, dtype: torch.dtype | None = None) -> str:
    """The backend that a request takes where statistics are shared: `auto` passes over those that cannot."""
    if requested(op, backend) not in ("auto", *_SHARING):
        raise BackendUnavailable(
            f"{op}: backend {requested(op, backend)!r} does not share statistics over processes; usable: auto, "
            f"{', '.join(_SHARING)}"
        )
    name = resolve(op, backend, device_type, dtype)
    if name in _SHARING:
        return name
    exact = dtype == torch.float64
    return "reference" if exact or no_triton(device_type) else "triton"


def merged_statistics(mean: Tensor, var: Tensor, count: int, group: str) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over the group from each process's own of `count` values."""
    if not group:
        return mean, var
    own = torch.cat([mean, var, torch.full_like(mean[:1], count)])
    every = own.new_empty(group_size(group) * len(own))
    dist.all_gather_into_tensor(every, own, group=_resolve_process_group(group))
    every = every.view(-1, len(own))
    torch._assert_async((every[:, -1] == count).all(), "processes with different numbers of values")
    means, variances = every[:, :-1].chunk(2, dim=1)
    return means.mean(0), variances.mean(0) + means.var(0, correction=0)


def mean_over_group(vector: Tensor, group: str) -> Tensor:
    """The mean over the processes of the group."""
    if not group:
        return vector
    total = vector.clone()
    dist.all_reduce(total, group=_resolve_process_group(group))
    return total / group_size(group)
