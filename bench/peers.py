"""The models a user would take instead: the same architecture built from timm's and from torchvision's parts.

Their own input, normalised float32 images, is made of uint8 ones by `FromPixels`.

With converted weights (`fastvitc.convert`) they compute what `fastvitc.VisionTransformer(config)` computes,
but for the order of floating-point sums. Each keeps its library's own initialisation. A library is imported when its
model is made: the other's can be had without it.
"""

from functools import partial

import torch
from torch import Tensor, nn

from fastvitc.errors import UsageError
from fastvitc.kernels.conv_stem.pixels import mixed
from fastvitc.models.config import StemConfig, ViTConfig
from fastvitc.models.stems import IMAGENET_MEAN, IMAGENET_STD


class FromPixels(nn.Module):
    """A peer's model as ours is called: uint8 images are normalised, (x/255 − mean)/std, and mixed in front of it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", 255.0 * torch.tensor(IMAGENET_MEAN).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", 255.0 * torch.tensor(IMAGENET_STD).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor, mix: Tensor | None = None) -> Tensor:
        """(B, 3, H, W) uint8 and a mix (5,) or None → what the model gives."""
        normal = (images.float() - self.mean) / self.std
        return self.model(normal if mix is None else mixed(normal, mix))


def timm_model(config: ViTConfig) -> nn.Module:
    """timm's ViT; the conv stem is its `ConvStem`, which leaves norm and activation off the last convolution.

    Raises:
        UsageError: a patchify stem with overlapping or padded patches.
    """
    from timm.layers import HybridEmbed
    from timm.models import VisionTransformer
    from timm.models.vision_transformer_hybrid import ConvStem

    if config.stem.kind == "conv":
        backbone = ConvStem(
            in_chans=config.in_chans,
            depth=len(config.stem.channels),
            channels=config.stem.channels,
            kernel_size=config.stem.kernels,
            stride=config.stem.strides,
            padding=config.stem.paddings,
        )
        stem = {"patch_size": 1, "embed_layer": partial(HybridEmbed, backbone, proj=False)}
    elif _tiles(config.stem):
        stem = {"patch_size": config.stem.stride}
    else:
        raise UsageError(f"timm's patches neither overlap nor have padding; got {config.stem}")
    return VisionTransformer(
        img_size=config.image_size,
        in_chans=config.in_chans,
        num_classes=config.num_classes,
        class_token=config.pool == "token",
        global_pool="token" if config.pool == "token" else "avg",
        fc_norm=False,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
        mlp_ratio=config.mlp_width / config.width,
        drop_path_rate=config.drop_path,
        **stem,
    )


def torchvision_model(config: ViTConfig) -> nn.Module:
    """torchvision's ViT with its `ConvStemConfig`; the sequence length follows from the stem's total stride.

    Raises:
        UsageError: torchvision has no such model: it takes square RGB images, reads a class token, has no
            drop path, pads hidden convolutions by half their kernel, and closes a conv stem with a 1x1.
    """
    from torchvision.models.vision_transformer import ConvStemConfig, VisionTransformer

    *hidden, closing = zip(config.stem.channels, config.stem.kernels, config.stem.strides, strict=True)
    if config.stem.kind == "conv":
        same_stem = closing == (config.width, 1, 1) and all(
            padding == (kernel - 1) // 2
            for padding, kernel in zip(config.stem.paddings, config.stem.kernels, strict=True)
        )
    else:
        same_stem = _tiles(config.stem)
    square = config.image_size[0] == config.image_size[1]
    if not (
        same_stem and square and config.in_chans == 3 and config.pool == "token" and not config.drop_path
    ):
        raise UsageError(
            "torchvision's ViT needs square RGB images, a class token, no drop path, and a stem of plain "
            f"patches or of padded convolutions closed by a 1x1; got {config}"
        )
    model = VisionTransformer(
        image_size=config.image_size[0],
        patch_size=config.stem.stride,
        num_layers=config.depth,
        num_heads=config.heads,
        hidden_dim=config.width,
        mlp_dim=config.mlp_width,
        num_classes=config.num_classes or 1,  # without a head below; a Linear of no outputs would warn
        conv_stem_configs=[ConvStemConfig(*layer) for layer in hidden] or None,
    )
    if config.num_classes == 0:
        model.heads = nn.Identity()
    return model


def _tiles(stem: StemConfig) -> bool:
    """Whether a patchify stem cuts the image into patches that neither overlap nor reach over its border."""
    return stem.kernels == stem.strides and stem.paddings == (0,)
