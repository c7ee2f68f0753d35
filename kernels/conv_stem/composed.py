"""The stem by PyTorch's convolutions with the Triton kernels of `bn_relu` between them."""

from functools import partial

from torch import Tensor

from fastvitc.kernels.bn_relu import bn_relu
from fastvitc.kernels.conv_stem import library


def _batch_norm_relu(
    z: Tensor, mean: Tensor, var: Tensor, gamma: Tensor, beta: Tensor, momentum: float, eps: float
) -> Tensor:
    return bn_relu(z, mean, var, gamma, beta, True, momentum, eps, backend="triton")


conv_stem = partial(library.conv_stem, normalize=_batch_norm_relu)
