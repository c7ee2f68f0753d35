"""The vision transformer: stem, encoder, head; and the function that makes one by name."""

from dataclasses import replace
from math import isqrt
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastvitc.errors import UsageError
from fastvitc.kernels import Choice
from fastvitc.kernels.choice.backends import parsed
from fastvitc.models.config import ViTConfig, as_size, preset
from fastvitc.models.encoder import Block
from fastvitc.models.stems import pixel_statistics

Init = Literal["paper", "drawn_head"]

_HEAD_STD = 0.02


class VisionTransformer(nn.Module):
    """ViT_P or ViT_C as of Xiao et al. 2021: stem, class token, learned positions, pre-norm blocks, LayerNorm, head.

    Args:
        config: sizes, stem and pooling.
        backend: implementation of the ops: one name for all, or {op: name} with "auto" for the ops left out; "auto"
            takes the one measured fastest on the device, else the first in the op's order that runs there.
        grad_checkpointing: keep only each block's input for backward and recompute the rest.
        init: "paper" as in the paper's code, where the head starts at zero, so a new model's logits are all zero;
            "drawn_head" draws the head's weights from a truncated normal distribution of deviation 0.02.

    Raises:
        UsageError: there is no such init.
    """

    def __init__(
        self,
        config: ViTConfig,
        *,
        backend: Choice = "auto",
        grad_checkpointing: bool = False,
        init: Init = "paper",
    ) -> None:
        super().__init__()
        if init not in get_args(Init):
            raise UsageError(f"there is no init {init!r}; choose among {', '.join(get_args(Init))}")
        self.config = config
        self.grad_checkpointing = grad_checkpointing
        #: (height, width) of the images that are taken now; for another than the configuration's the position
        #: embedding is interpolated in each forward pass.
        self.image_size = config.image_size
        #: Share of the patches that training leaves out after the stem, drawn for each image (Liu et al. 2023,
        #: "PatchDropout").
        self.patch_drop = 0.0
        backends = parsed(backend)
        self.stem = config.stem.build(config.in_chans, backend=backends)
        statistics = pixel_statistics(config.in_chans, config.mean, config.std)
        if statistics is not None:
            self.stem.normalise_by(*statistics)
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.width)) if config.pool == "token" else None
        self.pos_embed = nn.Parameter(torch.empty(1, config.tokens, config.width))
        rates = [config.drop_path * i / max(config.depth - 1, 1) for i in range(config.depth)]
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, config.mlp_width, rate, backend=backends) for rate in rates
        )
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.head = nn.Linear(config.width, config.num_classes) if config.num_classes else nn.Identity()
        nn.init.normal_(self.pos_embed, std=0.02)
        if config.num_classes:
            # Drawn last and then set to zero: one seed gives the rest of the model equal weights with either init.
            nn.init.trunc_normal_(self.head.weight, std=_HEAD_STD)
            nn.init.zeros_(self.head.bias)
            if init == "paper":
                nn.init.zeros_(self.head.weight)

    def forward_features(self, image: Tensor, mix: Tensor | None = None) -> Tensor:
        """Image and mix as `forward` takes them → tokens after the final LayerNorm (B, S, width)."""
        return self.norm(self._encode(image, mix))

    def _encode(self, image: Tensor, mix: Tensor | None) -> Tensor:
        self.check_image(image)
        x = self.stem(image, self.class_token, self._positions(), mix)
        if self.training and self.patch_drop > 0.0:
            x = self._some_patches(x)
        for block in self.blocks:
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x

    def _positions(self) -> Tensor:
        """The position embedding for the size of the images."""
        if self.image_size == self.config.image_size:
            return self.pos_embed
        grid = replace(self.config, image_size=self.image_size).grid
        return resize_pos_embed(self.pos_embed, self.config.grid, grid, self._prefix)

    def _some_patches(self, x: Tensor) -> Tensor:
        """(B, S, C) → the class token and a random part of each image's patches, at least one."""
        first, patches = x[:, : self._prefix], x[:, self._prefix :]
        kept = max(1, round(patches.shape[1] * (1.0 - self.patch_drop)))
        chosen = torch.rand(patches.shape[:2], device=x.device).argsort(1)[:, :kept, None]
        return torch.cat([first, patches.gather(1, chosen.expand(-1, -1, x.shape[2]))], dim=1)

    @property
    def _prefix(self) -> int:
        """Tokens before the patches."""
        return int(self.config.pool == "token")

    def forward(self, image: Tensor, mix: Tensor | None = None) -> Tensor:
        """Image (B, C, H, W) → logits (B, num_classes), or without classes pooled features (B, width).

        Args:
            image: normalised floating point, or uint8, see `ConvStem`.
            mix: (5,) float32 or None: mixup or CutMix of the batch with itself rolled by one, see
                `fastvitc.kernels.Pixels`.
        """
        x = self._encode(image, mix)
        pooled = self.norm(x[:, 0]) if self.config.pool == "token" else self.norm(x).mean(1)
        return self.head(pooled)

    def compile_parts(self) -> None:
        """torch.compile the stem and each block in place, on their first calls.

        Equal blocks share one graph, so the time to compile does not grow with the depth. A part's gradients are ready
        when its own backward pass is done, so DistributedDataParallel can send them while the next one computes.
        """
        for part in (self.stem, *self.blocks):
            part.compile(fullgraph=True, dynamic=False)

    def check_image(self, image: Tensor) -> None:
        """Raise ValueError for an image of another shape than the model's."""
        expected = (self.config.in_chans, *self.image_size)
        if image.dim() != 4 or tuple(image.shape[1:]) != expected:
            raise ValueError(
                f"this model takes images (B, {', '.join(map(str, expected))}), got {tuple(image.shape)}; "
                "resize them, or make the model with image_size=(height, width)"
            )

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        key = prefix + "pos_embed"
        found = state_dict.get(key)
        if found is not None and found.dim() == 3 and found.shape[1] != self.config.tokens:
            side = isqrt(found.shape[1] - self._prefix)
            if side * side == found.shape[1] - self._prefix:
                resized = resize_pos_embed(found, (side, side), self.config.grid, self._prefix)
                state_dict = {**state_dict, key: resized}
        super()._load_from_state_dict(state_dict, prefix, *args)


def resize_pos_embed(
    pos_embed: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], prefix_tokens: int = 1
) -> Tensor:
    """Position embedding (1, prefix + h·w, C) for another grid of patches, by antialiased bicubic interpolation.

    The first `prefix_tokens` rows (the class token's) are kept. `load_state_dict` of a model does this by itself
    where the weights come from a square image with another number of patches; for others call it first (an embedding
    with as many rows as the model's is loaded as it is).

    Raises:
        ValueError: `pos_embed` does not have prefix_tokens + h·w rows.
    """
    if pos_embed.dim() != 3 or pos_embed.shape[1] != prefix_tokens + old_grid[0] * old_grid[1]:
        raise ValueError(
            f"pos_embed must be (1, {prefix_tokens} + {old_grid[0]}·{old_grid[1]}, C), got {tuple(pos_embed.shape)}"
        )
    prefix, grid = pos_embed[:, :prefix_tokens], pos_embed[:, prefix_tokens:]
    grid = grid.mT.unflatten(2, old_grid).float()
    grid = F.interpolate(grid, new_grid, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([prefix, grid.flatten(2).mT.to(pos_embed.dtype)], dim=1)


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    image_size: int | tuple[int, int] | None = None,
    in_chans: int = 3,
    pool: str = "token",
    drop_path: float = 0.0,
    backend: Choice = "auto",
    grad_checkpointing: bool = False,
    init: Init = "paper",
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> VisionTransformer:
    """A freshly initialised model of a preset.

    Args:
        name: one of `list_models()`.
        num_classes: outputs of the head; 0 for pooled features instead of logits.
        image_size: side in pixels, or (height, width); by default the preset's (224, or 32 for the small presets).
            Both sides must be multiples of the stem's stride (16, or 8 for the small presets).
        in_chans: channels of the image.
        pool: "token" reads the class token, "mean" averages the tokens (there is no class token then).
        drop_path: rate of stochastic depth in the last block, rising linearly from 0 in the first.
        backend: implementation of the ops: one name for all, or {op: name}; see `VisionTransformer`.
        grad_checkpointing: trade compute for memory in training.
        init: "paper", or "drawn_head", which trains to more accuracy in short runs; see `VisionTransformer`.
        mean, std: of each channel in units of a pixel value from 0 to 1, by which uint8 images are normalised; by
            default ImageNet's, and of one channel their averages.

    Raises:
        UsageError: an unknown name (the nearest are named), a size that does not fit, backends of unknown ops, or an
            unknown init.
    """
    base = preset(name)
    config = replace(
        base,
        num_classes=num_classes,
        image_size=base.image_size if image_size is None else as_size(image_size),
        in_chans=in_chans,
        pool=pool,
        drop_path=drop_path,
        mean=mean,
        std=std,
    )
    return VisionTransformer(config, backend=backend, grad_checkpointing=grad_checkpointing, init=init)
