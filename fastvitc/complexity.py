"""Parameters, FLOPs and activations of a model, counted from its configuration.

The convention is that of the paper's code: one FLOP is one multiply-add or one bias addition of a convolution,
linear layer or attention product. Normalisation, activation functions, softmax and residual additions count as
nothing. Activations are the outputs of convolutions, linear layers and attention products.
"""

from dataclasses import dataclass, replace

from fastvitc.config import ViTConfig, as_size, preset
from fastvitc.model import VisionTransformer


@dataclass(frozen=True)
class Complexity:
    """Counts for one image. `flops` are multiply-adds plus bias additions; twice that is the usual count of
    floating-point operations in an MFU."""

    params: int = 0
    flops: int = 0
    acts: int = 0

    def __add__(self, other: "Complexity") -> "Complexity":
        return Complexity(self.params + other.params, self.flops + other.flops, self.acts + other.acts)

    def __mul__(self, times: int) -> "Complexity":
        return Complexity(self.params * times, self.flops * times, self.acts * times)


def _linear(inputs: int, outputs: int, tokens: int) -> Complexity:
    weights = inputs * outputs
    return Complexity(weights + outputs, (weights + outputs) * tokens, outputs * tokens)


def _stem(config: ViTConfig) -> Complexity:
    total = Complexity()
    stem, channels, (height, width) = config.stem, config.in_chans, config.image_size
    last = len(stem.channels) - 1
    for i, (outputs, kernel, stride) in enumerate(
        zip(stem.channels, stem.kernels, stem.strides, strict=True)
    ):
        height, width = ((side + 2 * stem.paddings[i] - kernel) // stride + 1 for side in (height, width))
        weights, pixels, bias = kernel**2 * channels * outputs, height * width, outputs * (i == last)
        norm = 2 * outputs * (i < last)
        total += Complexity(weights + bias + norm, (weights + bias) * pixels, outputs * pixels)
        channels = outputs
    return total


def _block(config: ViTConfig) -> Complexity:
    width, tokens = config.width, config.tokens
    scores = Complexity(0, tokens**2 * width, config.heads * tokens**2)
    values = Complexity(0, tokens**2 * width, width * tokens)
    norms = Complexity(params=4 * width)
    projections = _linear(width, 3 * width, tokens) + _linear(width, width, tokens)
    mlp = _linear(width, config.mlp_width, tokens) + _linear(config.mlp_width, width, tokens)
    return norms + projections + scores + values + mlp


def complexity(
    model: str | VisionTransformer | ViTConfig, image_size: int | tuple[int, int] | None = None
) -> Complexity:
    """Parameters, FLOPs and activations for one image, as integers.

    Args:
        model: a preset's name, a model or a configuration.
        image_size: side in pixels or (height, width); by default the model's own.

    Raises:
        UsageError: an unknown name, or a size that is not a multiple of the stem's stride.
    """
    config = _config(model)
    if image_size is not None:
        config = replace(config, image_size=as_size(image_size))
    embeddings = Complexity(params=(config.tokens + (config.pool == "token")) * config.width)
    final_norm = Complexity(params=2 * config.width)
    head = _linear(config.width, config.num_classes, 1) if config.num_classes else Complexity()
    return _stem(config) + embeddings + _block(config) * config.depth + final_norm + head


def stem_complexity(model: str | VisionTransformer | ViTConfig) -> Complexity:
    """The stem's share of `complexity`."""
    return _stem(_config(model))


def block_complexity(model: str | VisionTransformer | ViTConfig) -> Complexity:
    """The share of one encoder block in `complexity`."""
    return _block(_config(model))


def _config(model: str | VisionTransformer | ViTConfig) -> ViTConfig:
    return preset(model) if isinstance(model, str) else getattr(model, "config", model)
