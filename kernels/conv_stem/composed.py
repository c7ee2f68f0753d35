"""The stem by PyTorch's convolutions with a backend of `bn_relu` between them."""

from functools import partial

from fastvitc.kernels.bn_relu import bn_relu
from fastvitc.kernels.conv_stem import library, pixels

with_triton = partial(library.conv_stem, normalize=partial(bn_relu, backend="triton"))
with_native = partial(
    library.conv_stem, normalize=partial(bn_relu, backend="native"), pixels=pixels.channels_last_pixels
)
