"""What a BatchNorm is besides its input: one value, which every backend of `bn_relu` gets."""

from typing import NamedTuple

from torch import Tensor


class Norm(NamedTuple):
    """Vectors are (C,). `training` tells whether the batch's own statistics normalise.

    `group` names the processes whose batches share the statistics; "" is this process alone.
    """

    running_mean: Tensor
    running_var: Tensor
    weight: Tensor
    bias: Tensor
    training: bool
    eps: float
    group: str
