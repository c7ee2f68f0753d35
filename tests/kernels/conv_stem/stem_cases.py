"""Small stems for the tests of `conv_stem`: their inputs, and the same stem spelled out layer by layer."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvitc.kernels import Layers, conv_stem

OWN = ["reference", "triton"]
EXACT = ["reference", "torch"]  # compute in float64 too


@dataclass
class Case:
    """A stem: channels of image and 3x3 layers, strides of the layers, width, and the kernel of the closing one."""

    channels: tuple[int, ...] = (3, 8, 16)
    strides: tuple[int, ...] = (2, 2)
    width: int = 24
    image: tuple[int, int] = (16, 16)
    batch: int = 2
    class_token: bool = True
    positions: bool = True
    closing: int = 1
    statistics: list = field(default_factory=list)

    def inputs(self, dtype=torch.float64):
        """[image, convs, weights, biases, proj weight, proj bias, class token?, positions?], flat."""
        layers = list(zip(self.channels, self.channels[1:], strict=False))
        scale = [(9 * i) ** -0.5 for i, _ in layers]
        flat = [torch.randn(self.batch, self.channels[0], *self.image)]
        flat += [s * torch.randn(o, i, 3, 3) for s, (i, o) in zip(scale, layers, strict=True)]
        flat += [torch.rand(o) + 0.5 for _, o in layers]
        flat += [torch.randn(o) for _, o in layers]
        flat += [
            0.1 * torch.randn(self.width, self.channels[-1], self.closing, self.closing),
            torch.randn(self.width),
        ]
        tokens = self.tokens()
        flat += [torch.randn(1, 1, self.width)] if self.class_token else []
        flat += [torch.randn(1, tokens, self.width)] if self.positions else []
        return [t.to(dtype) for t in flat]

    def uint8_image(self):
        return torch.randint(256, (self.batch, self.channels[0], *self.image), dtype=torch.uint8)

    def tokens(self):
        height, width = self.image
        for stride in self.strides:
            height, width = ((side - 1) // stride + 1 for side in (height, width))
        return (height // self.closing) * (width // self.closing) + self.class_token

    def arguments(self, flat) -> tuple[Tensor, Layers, Tensor | None, Tensor | None]:
        """The first arguments of `conv_stem`: image, layers, class token, positions; from the flat inputs."""
        n = len(self.strides)
        image, *rest = flat
        convs, weights, biases = rest[:n], rest[n : 2 * n], rest[2 * n : 3 * n]
        proj_weight, proj_bias, *ends = rest[3 * n :]
        class_token = ends.pop(0) if self.class_token else None
        positions = ends.pop(0) if self.positions else None
        wide = torch.promote_types(proj_weight.dtype, torch.float32)
        self.statistics = [torch.linspace(-0.5, 0.5, c, dtype=wide) for c in self.channels[1:]]
        self.statistics += [torch.linspace(0.5, 1.5, c, dtype=wide) for c in self.channels[1:]]
        layers = Layers(
            conv_weights=convs,
            bn_weights=[v.to(wide) for v in weights],
            bn_biases=[v.to(wide) for v in biases],
            running_means=self.statistics[:n],
            running_vars=self.statistics[n:],
            proj_weight=proj_weight,
            proj_bias=proj_bias,
            strides=(*self.strides, self.closing),
            paddings=(1,) * n + (0,),
        )
        return image, layers, class_token, positions

    def ours(self, backend, training, pixels=None):
        return lambda *flat: conv_stem(*self.arguments(flat), training, pixels=pixels, backend=backend)

    def layer_by_layer(self, training):
        def run(*flat):
            x, layers, class_token, positions = self.arguments(flat)
            for w, g, b, m, v, stride in zip(*layers[:5], self.strides, strict=True):
                x = F.relu(F.batch_norm(F.conv2d(x, w, None, stride, 1), m, v, g, b, training))
            x = F.conv2d(x, layers.proj_weight, layers.proj_bias, self.closing).flatten(2).mT
            if class_token is not None:
                x = torch.cat([class_token.expand(len(x), -1, -1), x], 1)
            return x if positions is None else x + positions

        return run


CASES = {
    "4-stage": Case((3, 8, 12, 16, 24), (2, 2, 2, 2), 24, (32, 32)),
    "strides-1-and-2": Case((3, 6, 8, 8, 10), (2, 2, 1, 2), 12, (24, 16)),
    "odd-sides": Case((3, 5, 7), (2, 2), 9, (17, 13)),
    "one-channel": Case((1, 4), (2,), 6, (8, 10)),
    "no-class-token": Case(class_token=False),
    "no-positions": Case(positions=False),
    "plain": Case(class_token=False, positions=False),
    "closing-4x4": Case((3, 8), (2,), 12, (16, 24), closing=4),
    "patchify": Case((3,), (), 16, (16, 24), closing=8),
}
