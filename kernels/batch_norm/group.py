"""Statistics over a process group. Every process of it holds the same number of values.

Ops know a group by its name; "" means this process alone.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group


@torch.compiler.assume_constant_result
def group_name(process_group: dist.ProcessGroup | None) -> str:
    """The name that ops know a process group by; "" for None."""
    return "" if process_group is None else process_group.group_name


@torch.compiler.assume_constant_result
def group_size(group: str) -> int:
    """How many processes the group has."""
    return dist.get_world_size(_resolve_process_group(group)) if group else 1


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
