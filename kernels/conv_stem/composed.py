"""The stem by PyTorch's convolutions with the Triton kernels of `bn_relu` between them."""

from collections.abc import Sequence

from torch import Tensor

from fastvitc.kernels.bn_relu import bn_relu
from fastvitc.kernels.conv_stem import library
from fastvitc.kernels.conv_stem.stem import Stem


def _batch_norm_relu(
    z: Tensor, mean: Tensor, var: Tensor, gamma: Tensor, beta: Tensor, momentum: float, eps: float
) -> Tensor:
    return bn_relu(z, mean, var, gamma, beta, True, momentum, eps, backend="triton")


def conv_stem(
    image: Tensor,
    stem: Stem,
    running_means: Sequence[Tensor],
    running_vars: Sequence[Tensor],
    class_token: Tensor | None,
    pos_embed: Tensor | None,
    training: bool,
    momentum: float,
) -> Tensor:
    """As `library.conv_stem`."""
    arguments = image, stem, running_means, running_vars, class_token, pos_embed, training, momentum
    return library.conv_stem(*arguments, _batch_norm_relu)
