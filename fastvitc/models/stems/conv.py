"""The early-convolution stem (Xiao et al. 2021) and the patchify stem (Dosovitskiy et al. 2021)."""

from dataclasses import dataclass
from itertools import pairwise
from math import prod, sqrt
from typing import Literal

import torch.distributed as dist
from torch import Tensor, nn

from fastvitc.errors import UsageError
from fastvitc.kernels import Choice, Layers, conv_stem
from fastvitc.kernels.choice.backends import parsed
from fastvitc.models.counts import Complexity
from fastvitc.models.stems.base import ImageStem


@dataclass(frozen=True)
class StemConfig:
    """The layers between image and tokens, in order; the closing convolution is the last entry of each tuple.

    A conv stem has n 3x3 convolutions without bias, each followed by BatchNorm and ReLU, and a closing
    convolution with bias and nothing after it. A patchify stem has the closing convolution only.
    """

    channels: tuple[int, ...]
    kernels: tuple[int, ...]
    strides: tuple[int, ...]

    def __post_init__(self) -> None:
        sizes = (*self.channels, *self.kernels, *self.strides)
        if not len(self.channels) == len(self.kernels) == len(self.strides) > 0 or min(sizes) < 1:
            raise UsageError(
                "a stem needs equally many channels, kernels and strides, at least one of each and all positive; got "
                f"channels={self.channels}, kernels={self.kernels}, strides={self.strides}"
            )

    @property
    def kind(self) -> Literal["conv", "patchify"]:
        return "conv" if len(self.channels) > 1 else "patchify"

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.channels[-1]

    @property
    def stride(self) -> int:
        """Pixels per token, along each side."""
        return prod(self.strides)

    @property
    def paddings(self) -> tuple[int, ...]:
        """Half the kernel where it is odd, none for even ones and for the closing convolution (paper, table 2)."""
        return (*(k // 2 if k % 2 else 0 for k in self.kernels[:-1]), 0)

    def build(self, in_chans: int = 3, *, backend: Choice = "auto") -> "ConvStem":
        """The stem's module, freshly initialised."""
        module = ConvStem if self.kind == "conv" else PatchifyStem
        return module(self, in_chans, backend=backend)

    def complexity(self, in_chans: int, image_size: tuple[int, int]) -> Complexity:
        """Parameters, FLOPs and activations for one image of (height, width) pixels."""
        total, channels, (height, width) = Complexity(), in_chans, image_size
        layers = list(zip(self.channels, self.kernels, self.strides, self.paddings, strict=True))
        for i, (outputs, kernel, stride, padding) in enumerate(layers):
            height, width = ((side + 2 * padding - kernel) // stride + 1 for side in (height, width))
            closing = i == len(layers) - 1
            weights, bias = kernel**2 * channels * outputs, outputs if closing else 0
            norm = 0 if closing else 2 * outputs
            pixels = height * width
            total += Complexity(weights + bias + norm, (weights + bias) * pixels, outputs * pixels)
            channels = outputs
        return total


class ConvStem(ImageStem):
    """n 3x3 convolutions, each with BatchNorm and ReLU, and a closing convolution (Xiao et al. 2021, section 4).

    The closing convolution has a bias and nothing after it. With a single convolution this is the patchify stem.
    nn.SyncBatchNorm.convert_sync_batchnorm makes the training statistics those of the norms' process group, which the
    backends triton and reference compute.

    Args:
        config: channels, kernels and strides of all convolutions.
        in_chans: channels of the image.
        backend: passed to `fastvitc.kernels.conv_stem`.
    """

    def __init__(self, config: StemConfig, in_chans: int = 3, *, backend: Choice = "auto") -> None:
        super().__init__(in_chans)
        self.config = config
        self.backend = parsed(backend)["conv_stem"]
        pairs = pairwise((in_chans, *config.channels))
        sizes = list(zip(pairs, config.kernels, config.strides, config.paddings, strict=True))
        self.convs = nn.ModuleList(nn.Conv2d(*io, *size, bias=False) for io, *size in sizes[:-1])
        self.norms = nn.ModuleList(nn.BatchNorm2d(conv.out_channels) for conv in self.convs)
        io, *size = sizes[-1]
        self.proj = nn.Conv2d(*io, *size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initialisation of the paper's code: the variance ignores the area of the 3x3 kernels."""
        for conv in self.convs:
            nn.init.normal_(conv.weight, std=sqrt(2.0 / conv.out_channels))
        nn.init.normal_(self.proj.weight, std=sqrt(1.0 / self.proj.out_channels))
        nn.init.zeros_(self.proj.bias)

    def forward(
        self,
        image: Tensor,
        class_token: Tensor | None = None,
        pos_embed: Tensor | None = None,
        mix: Tensor | None = None,
    ) -> Tensor:
        """(B, in_chans, H, W) → tokens (B, S, width), S = H/stride · W/stride, plus one with a class token.

        A floating-point image is taken as it is. A uint8 image is normalised here, (image/255 − mean)/std, with the
        means and deviations of `pixel_statistics`. `mix` (5,) float32 mixes the batch with itself rolled by one, see
        `fastvitc.kernels.Pixels`.
        """
        training, momentum, eps, process_group = self._norm_settings()
        if training:
            for norm in self.norms:
                norm.num_batches_tracked.add_(1)
        return conv_stem(
            image,
            self.layers(),
            class_token,
            pos_embed,
            training,
            momentum,
            eps,
            pixels=self.pixels(image, mix),
            process_group=process_group,
            backend=self.backend,
        )

    def layers(self) -> Layers:
        """The parameters, statistics and geometry as `fastvitc.kernels.conv_stem` takes them."""
        return Layers(
            conv_weights=[conv.weight for conv in self.convs],
            bn_weights=[norm.weight for norm in self.norms],
            bn_biases=[norm.bias for norm in self.norms],
            running_means=[norm.running_mean for norm in self.norms],
            running_vars=[norm.running_var for norm in self.norms],
            proj_weight=self.proj.weight,
            proj_bias=self.proj.bias,
            strides=self.config.strides,
            paddings=self.config.paddings,
        )

    def _norm_settings(self) -> tuple[bool, float, float, dist.ProcessGroup | None]:
        """(training, momentum, eps, processes) of the norms; `stem.norms.eval()` freezes them, as in any module."""
        settings = {(norm.training, norm.momentum, norm.eps) for norm in self.norms} or {(False, 0.1, 1e-5)}
        synchronized = {isinstance(norm, nn.SyncBatchNorm) for norm in self.norms} or {False}
        if len(settings) > 1 or len(synchronized) > 1:
            raise ValueError(
                f"the stem's norms must share (training, momentum, eps) and their type, they have {sorted(settings)}, "
                f"{sorted({type(norm).__name__ for norm in self.norms})}"
            )
        ((training, momentum, eps),) = settings
        group = None
        if synchronized == {True} and dist.is_initialized():
            group = self.norms[0].process_group or dist.group.WORLD
        return training, momentum, eps, group


class PatchifyStem(ConvStem):
    """One p x p convolution of stride p (Dosovitskiy et al. 2021, equation 1): a conv stem without its 3x3 layers."""

    def reset_parameters(self) -> None:
        """Truncated normal of variance 1/fan_in; zero bias."""
        nn.init.trunc_normal_(self.proj.weight, std=sqrt(1.0 / self.proj.weight[0].numel()))
        nn.init.zeros_(self.proj.bias)
