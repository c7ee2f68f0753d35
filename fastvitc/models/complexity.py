"""Parameters, FLOPs and activations of a model, counted from its configuration.

The convention stands in `fastvitc.models.counts`.
"""

from dataclasses import replace

from fastvitc.models.config import ViTConfig, as_size, preset
from fastvitc.models.counts import Complexity, linear
from fastvitc.models.vit import VisionTransformer


def _block(config: ViTConfig) -> Complexity:
    width, tokens = config.width, config.tokens
    scores = Complexity(0, tokens**2 * width, config.heads * tokens**2)
    values = Complexity(0, tokens**2 * width, width * tokens)
    norms = Complexity(params=4 * width)
    projections = linear(width, 3 * width, tokens) + linear(width, width, tokens)
    mlp = linear(width, config.mlp_width, tokens) + linear(config.mlp_width, width, tokens)
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
    head = linear(config.width, config.num_classes, 1) if config.num_classes else Complexity()
    return (
        config.stem.complexity(config.in_chans, config.image_size)
        + embeddings
        + _block(config) * config.depth
        + final_norm
        + head
    )


def stem_complexity(model: str | VisionTransformer | ViTConfig) -> Complexity:
    """The stem's share of `complexity`."""
    config = _config(model)
    return config.stem.complexity(config.in_chans, config.image_size)


def block_complexity(model: str | VisionTransformer | ViTConfig) -> Complexity:
    """The share of one encoder block in `complexity`."""
    return _block(_config(model))


def _config(model: str | VisionTransformer | ViTConfig) -> ViTConfig:
    return preset(model) if isinstance(model, str) else getattr(model, "config", model)
