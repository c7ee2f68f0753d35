"""Checks of the inputs of `conv_stem`: one clear error before anything runs."""

import torch
from torch import Tensor

from fastvitc.kernels.choice.checks import check_device, check_floating
from fastvitc.kernels.conv_stem.arguments import Layers, Pixels

_LISTS = ("conv_weights", "bn_weights", "bn_biases", "running_means", "running_vars")


def check(
    image: Tensor,
    layers: Layers,
    pixels: Pixels,
    class_token: Tensor | None,
    pos_embed: Tensor | None,
    training: bool,
) -> list[tuple[int, int]]:
    """Raise for inputs that do not fit each other; return the grid (h, w) of each convolution's output."""
    if image.dim() != 4:
        raise ValueError(
            f"conv_stem: image must be (B, C, H, W), got {image.dim()} dimensions {tuple(image.shape)}"
        )
    _check_pixels(image, pixels)
    _check_tensors(image, layers, pixels, class_token, pos_embed)
    _check_geometry(layers)
    _check_channels(image.shape[1], layers)
    grids = layers.grids(*image.shape[2:])
    if any(min(grid) < 1 for grid in grids):
        raise ValueError(f"conv_stem: an image of {image.shape[2]}x{image.shape[3]} leaves no tokens")
    values = [len(image) * height * width for height, width in grids[:-1]]
    if training and values and min(values) < 2:
        raise ValueError(
            f"conv_stem: training needs more than one value per channel, got image {tuple(image.shape)}"
        )
    _check_ends(grids[-1], layers.proj_weight.shape[0], class_token, pos_embed)
    return grids


def _check_pixels(image: Tensor, pixels: Pixels) -> None:
    scale, shift, mix = pixels
    if (scale is None) != (shift is None):
        given = "scale" if shift is None else "shift"
        raise ValueError(f"conv_stem: pixels.scale and pixels.shift go together, got only {given}")
    for name, vector in (("scale", scale), ("shift", shift)):
        if vector is not None and vector.shape != image.shape[1:2]:
            raise ValueError(
                f"conv_stem: pixels.{name} must be ({image.shape[1]},), got {tuple(vector.shape)}"
            )
    if mix is not None and (mix.shape != (5,) or mix.dtype != torch.float32):
        raise ValueError(f"conv_stem: pixels.mix must be (5,) float32, got {tuple(mix.shape)} {mix.dtype}")
    if not image.is_floating_point() and (image.dtype != torch.uint8 or scale is None):
        raise TypeError(
            f"conv_stem: image must be a floating-point tensor, or uint8 with pixels.scale and pixels.shift, got "
            f"{image.dtype}{' without them' if scale is None else ''}"
        )


def _check_tensors(
    image: Tensor, layers: Layers, pixels: Pixels, class_token: Tensor | None, pos_embed: Tensor | None
) -> None:
    lists = {
        f"{name}[{i}]": t
        for name, tensors in zip(_LISTS, layers, strict=False)
        for i, t in enumerate(tensors)
    }
    ends = {"class_token": class_token, "pos_embed": pos_embed}
    proj = {"proj_weight": layers.proj_weight, "proj_bias": layers.proj_bias}
    vectors = {"pixels.scale": pixels.scale, "pixels.shift": pixels.shift, "pixels.mix": pixels.mix}
    tensors = {name: t for name, t in {**lists, **ends, **proj, **vectors}.items() if t is not None}
    check_device("conv_stem", "image", image, **tensors)
    check_floating("conv_stem", **tensors)
    dtypes = {weight.dtype for weight in layers.convolutions()}
    if len(dtypes) > 1:
        raise TypeError(
            f"conv_stem: the convolution weights must share a dtype, got {sorted(map(str, dtypes))}"
        )


def _check_geometry(layers: Layers) -> None:
    strides, paddings = layers.strides, layers.paddings
    lengths = [len(tensors) for tensors in layers[:5]]
    if any(n != lengths[0] for n in (*lengths, len(strides) - 1, len(paddings) - 1)):
        raise ValueError(
            "conv_stem: the five lists over the layers need n entries and strides and paddings n + 1, got "
            f"{lengths} and {len(strides)}, {len(paddings)}"
        )
    if not all(isinstance(size, int) and size >= 1 for size in strides) or not all(
        isinstance(size, int) and size >= 0 for size in paddings
    ):
        raise ValueError(
            "conv_stem: strides must be integers from 1 and paddings from 0, got "
            f"{tuple(strides)} and {tuple(paddings)}"
        )


def _check_channels(channels: int, layers: Layers) -> None:
    for i, weight in enumerate(layers.convolutions()):
        if weight.dim() != 4 or weight.shape[1] != channels:
            raise ValueError(
                f"conv_stem: convolution {i} needs a weight (out, {channels}, k, k), got {tuple(weight.shape)}"
            )
        channels = weight.shape[0]
        closing = i == len(layers.conv_weights)
        for vector in [layers.proj_bias] if closing else [tensors[i] for tensors in layers[1:5]]:
            if vector.shape != (channels,):
                raise ValueError(
                    f"conv_stem: the vectors of convolution {i} must be ({channels},), got {tuple(vector.shape)}"
                )


def _check_ends(
    grid: tuple[int, int], width: int, class_token: Tensor | None, pos_embed: Tensor | None
) -> None:
    if class_token is not None and class_token.shape != (1, 1, width):
        raise ValueError(f"conv_stem: class_token must be (1, 1, {width}), got {tuple(class_token.shape)}")
    tokens = grid[0] * grid[1] + int(class_token is not None)
    if pos_embed is not None and pos_embed.shape != (1, tokens, width):
        raise ValueError(
            f"conv_stem: pos_embed must be (1, {tokens}, {width}) for a {grid[0]}x{grid[1]} grid, "
            f"got {tuple(pos_embed.shape)}"
        )
