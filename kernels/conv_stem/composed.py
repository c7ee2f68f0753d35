"""The stem by PyTorch's convolutions with a backend of `bn_relu` between them."""

from functools import partial

from fastvitc.kernels.conv_stem import library, native

with_triton = partial(library.conv_stem, norms="triton")
with_native = partial(library.conv_stem, norms="native", first_input=native.channels_last)
