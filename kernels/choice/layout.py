"""The layout of results, which every op promises to be that of its inputs."""

import torch
from torch import Tensor


def copied_as(value: Tensor, like: Tensor) -> Tensor:
    """A copy of `value` in the dtype and strides of `like`: outputs of an op may share no memory."""
    return torch.empty_like(like).copy_(value)


def laid_out_as(value: Tensor, like: Tensor) -> Tensor:
    """`value` in the dtype and strides of `like`; itself where it has them."""
    same = value.dtype == like.dtype and value.stride() == like.stride()
    return value if same else copied_as(value, like)
