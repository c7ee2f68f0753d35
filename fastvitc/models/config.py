"""Model configurations as frozen dataclasses, and the named presets.

Sources: Xiao, Singh, Mintun, Darrell, Dollár, Girshick, "Early Convolutions Help Transformers See Better"
(NeurIPS 2021, arXiv 2106.14881, v3): table 1 (models), table 2 (stem ablation), appendix (36GF, 72GF).
"""

import difflib
from dataclasses import dataclass, replace
from typing import Literal

from fastvitc.errors import UsageError
from fastvitc.models.stems import StemConfig, pixel_statistics


@dataclass(frozen=True)
class ViTConfig:
    """A Vision Transformer: stem, `depth` pre-norm blocks, final LayerNorm, linear head.

    `image_size` is (height, width) in pixels; `pool` is "token" (a class token is prepended and read out) or
    "mean" (no class token; the tokens are averaged after the final LayerNorm); `drop_path` is the rate of the
    last block, rising linearly from 0 at the first. `mean` and `std` normalise uint8 images, in units of a pixel value
    from 0 to 1, a number for each channel; None: ImageNet's, and of one channel their averages.
    """

    stem: StemConfig
    width: int
    mlp_width: int
    heads: int
    depth: int
    image_size: tuple[int, int] = (224, 224)
    num_classes: int = 1000
    in_chans: int = 3
    pool: Literal["token", "mean"] = "token"
    drop_path: float = 0.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.heads < 1 or self.width % self.heads:
            raise UsageError(
                f"heads must divide width, got width={self.width} and heads={self.heads}; "
                f"the nearest number of heads that does is {self._nearest_heads()}"
            )
        if self.stem.width != self.width:
            raise UsageError(
                f"the stem must end in the encoder's width, got {self.stem.width} channels "
                f"for width {self.width}"
            )
        if self.pool not in ("token", "mean"):
            raise UsageError(f'pool must be "token" or "mean", got {self.pool!r}')
        if not 0.0 <= self.drop_path < 1.0:
            raise UsageError(f"drop_path must be in [0, 1), got {self.drop_path}")
        if self.depth < 1 or self.in_chans < 1 or self.num_classes < 0:
            raise UsageError(
                "depth and in_chans must be at least 1 and num_classes at least 0, got "
                f"depth={self.depth}, in_chans={self.in_chans}, num_classes={self.num_classes}"
            )
        check_image_size(self.image_size, self.stem.stride)
        pixel_statistics(self.in_chans, self.mean, self.std)

    def _nearest_heads(self) -> int:
        divisors = [n for n in range(1, self.width + 1) if self.width % n == 0]
        return min(divisors, key=lambda n: abs(n - self.heads))

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens along (height, width), the class token not counted."""
        return self.image_size[0] // self.stem.stride, self.image_size[1] // self.stem.stride

    @property
    def tokens(self) -> int:
        """Sequence length, the class token included where there is one."""
        return self.grid[0] * self.grid[1] + (self.pool == "token")


def as_size(image_size: int | tuple[int, ...]) -> tuple[int, int]:
    """(height, width) from one number, or a tuple of one or two."""
    sides = (image_size,) if isinstance(image_size, int) else tuple(image_size)
    sides = sides * 2 if len(sides) == 1 else sides
    if len(sides) != 2 or not all(isinstance(side, int) for side in sides):
        raise UsageError(
            f"image_size is a side or (height, width), whole numbers of pixels; got {image_size}"
        )
    return sides


def check_image_size(image_size: tuple[int, int], stride: int) -> None:
    """Raise UsageError unless both sides are positive multiples of the stem's stride."""
    if any(side <= 0 or side % stride for side in image_size):
        fits = tuple(max(stride, round(side / stride) * stride) for side in image_size)
        raise UsageError(
            f"image height and width must be positive multiples of the stem's stride {stride}, got "
            f"{image_size[0]}x{image_size[1]}; the nearest size that fits is {fits[0]}x{fits[1]}"
        )


def _patchify(width: int, patch: int = 16) -> StemConfig:
    return StemConfig((width,), (patch,), (patch,))


def _conv(channels: tuple[int, ...], strides: tuple[int, ...], width: int) -> StemConfig:
    return StemConfig((*channels, width), (3,) * len(channels) + (1,), (*strides, 1))


_STRIDES_4 = (2, 2, 2, 2)
_CHANNELS_6, _STRIDES_6 = (64, 128, 128, 256, 256, 512), (2, 2, 1, 2, 1, 2)

_VITC_4GF = ViTConfig(_conv((48, 96, 192, 384), _STRIDES_4, 384), 384, 1152, heads=6, depth=11)


def _ablation(kernels: tuple[int, ...], strides: tuple[int, ...], channels: tuple[int, ...]) -> ViTConfig:
    return replace(_VITC_4GF, stem=StemConfig(channels, kernels, strides))


_PRESETS: dict[str, ViTConfig] = {
    # Table 1; the conv stem replaces one block.
    "vitp_1gf": ViTConfig(_patchify(192), 192, 576, heads=3, depth=12),
    "vitc_1gf": ViTConfig(_conv((24, 48, 96, 192), _STRIDES_4, 192), 192, 576, heads=3, depth=11),
    "vitp_4gf": ViTConfig(_patchify(384), 384, 1152, heads=6, depth=12),
    "vitc_4gf": _VITC_4GF,
    "vitp_18gf": ViTConfig(_patchify(768), 768, 3072, heads=12, depth=12),
    "vitc_18gf": ViTConfig(_conv(_CHANNELS_6, _STRIDES_6, 768), 768, 3072, heads=12, depth=11),
    "vitp_36gf": ViTConfig(_patchify(1024), 1024, 4096, heads=16, depth=14),
    "vitc_36gf": ViTConfig(_conv(_CHANNELS_6, _STRIDES_6, 1024), 1024, 4096, heads=16, depth=13),
    # Appendix; at this size the paper keeps all 22 blocks beside the 18GF stem.
    "vitp_72gf": ViTConfig(_patchify(1152), 1152, 4608, heads=18, depth=22),
    "vitc_72gf": ViTConfig(_conv(_CHANNELS_6, _STRIDES_6, 1152), 1152, 4608, heads=18, depth=22),
    # Table 2, the stem ablation at 4GF; its P and C are vitp_4gf and vitc_4gf.
    "vitc_4gf_s1": _ablation((3, 3, 3, 2, 1), (2, 2, 2, 2, 1), (42, 104, 208, 416, 384)),
    "vitc_4gf_s2": _ablation((3, 3, 3, 4, 1), (2, 2, 1, 4, 1), (32, 64, 128, 256, 384)),
    "vitc_4gf_s3": _ablation((3, 3, 3, 8, 1), (2, 1, 1, 8, 1), (17, 34, 68, 136, 384)),
    "vitc_4gf_s4": _ablation((3, 3, 3, 16, 1), (1, 1, 1, 16, 1), (8, 16, 32, 64, 384)),
    # For small images; not in the paper. Stride 8 makes 17 tokens of 32x32 pixels.
    "vitp_nano": ViTConfig(_patchify(96, 8), 96, 288, heads=3, depth=6, image_size=(32, 32)),
    "vitc_nano": ViTConfig(
        _conv((24, 48, 96), (2, 2, 2), 96), 96, 288, heads=3, depth=5, image_size=(32, 32)
    ),
}


def list_models() -> list[str]:
    """Names of the presets that `create_model` and `complexity` take."""
    return list(_PRESETS)


def preset(name: str) -> ViTConfig:
    """The configuration of a preset; UsageError with the nearest names when there is none."""
    if name not in _PRESETS:
        near = difflib.get_close_matches(name, _PRESETS, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known models: {', '.join(_PRESETS)}"
        raise UsageError(f"unknown model {name!r}; {hint}")
    return _PRESETS[name]
