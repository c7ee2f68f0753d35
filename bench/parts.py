"""The parts of a training step whose traffic is counted, as modules of ours and of the peer's with equal inputs.

Everything runs in training under bfloat16 autocast. The stem goes from a uint8 channels-last image to the tokens, with
mixup, normalisation, class token and position embedding. Inputs are zeros: no access depends on a value, but for those
to pixels outside a mix's box, and mixup has none.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.interpreted import Build
from bench.least import stem_bytes
from bench.models import mix_of, one_block
from bench.peers import FromPixels, timm_model
from fastvitc.kernels import attention, bn_relu
from fastvitc.models.config import ViTConfig
from fastvitc.models.encoder import Block


@dataclass(frozen=True)
class Part:
    """`ours` and `peer`: batch size → module and inputs. `least`: bytes of (forward, backward) per image, see the
    functions below; weights and other fixed costs are not in it."""

    ours: Build
    peer: Build
    least: tuple[int, int]


class _Autocast(nn.Module):
    """A function with its modules and parameters, under autocast."""

    def __init__(self, function: Callable[..., Tensor], **owned: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, value in owned.items():
            setattr(self, name, value)
        self.to(memory_format=torch.channels_last)

    def forward(self, *inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.function(self, *inputs)


def _zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Zeros that require a gradient; of images, in channels-last memory."""
    dense = torch.zeros(shape[0], *shape[2:], shape[1], dtype=dtype).movedim(-1, 1)
    return (dense if len(shape) == 4 else torch.zeros(shape, dtype=dtype)).requires_grad_()


def attention_part(config: ViTConfig) -> Part:
    """Least: forward reads qkv and writes the output; backward reads qkv, output and its gradient and writes dqkv."""
    tokens, width, heads = config.tokens, config.width, config.heads

    def sdpa(_: nn.Module, qkv: Tensor) -> Tensor:
        batch = qkv.shape[0]
        q, k, v = qkv.reshape(batch, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)

    def own(_: nn.Module, qkv: Tensor) -> Tensor:
        return attention(qkv, heads, backend="triton")

    def build(function: Callable[..., Tensor], batch: int) -> tuple[nn.Module, list[Tensor]]:
        return _Autocast(function), [_zeros(batch, tokens, 3 * width)]

    matrix = 2 * tokens * width
    return Part(lambda batch: build(own, batch), lambda batch: build(sdpa, batch), (4 * matrix, 8 * matrix))


def bn_relu_part(config: ViTConfig) -> Part:
    """After the first convolution. Least: forward reads x and writes y; backward reads dy and x and writes dx."""
    channels = config.stem.channels[0]
    height, width = (side // config.stem.strides[0] for side in config.image_size)

    def native(norm: nn.Module, x: Tensor) -> Tensor:
        return F.relu(norm.norm(x))

    def own(module: nn.Module, x: Tensor) -> Tensor:
        norm = module.norm
        statistics = norm.running_mean, norm.running_var
        return bn_relu(x, *statistics, norm.weight, norm.bias, True, backend="triton")

    def build(function: Callable[..., Tensor], batch: int) -> tuple[nn.Module, list[Tensor]]:
        module = _Autocast(function, norm=nn.BatchNorm2d(channels))
        return module, [_zeros(batch, channels, height, width)]

    plane = 2 * channels * height * width
    return Part(lambda batch: build(own, batch), lambda batch: build(native, batch), (2 * plane, 3 * plane))


def stem_part(config: ViTConfig) -> Part:
    """Least: see `bench.least`. The peer is timm's stem with its class token and positions."""

    def timm(module: nn.Module, image: Tensor, mix: Tensor) -> Tensor:
        tokens = module.stem(image, mix)
        return torch.cat([module.token.expand(image.shape[0], -1, -1), tokens], 1) + module.positions

    def own(module: nn.Module, image: Tensor, mix: Tensor) -> Tensor:
        return module.stem(image, module.token, module.positions, mix)

    def build(function: Callable[..., Tensor], batch: int, stem: nn.Module) -> tuple[nn.Module, list[Tensor]]:
        token = nn.Parameter(torch.zeros(1, 1, config.width))
        positions = nn.Parameter(torch.zeros(1, config.tokens, config.width))
        module = _Autocast(function, token=token, positions=positions, stem=stem)
        image = torch.zeros(batch, *config.image_size, config.in_chans, dtype=torch.uint8)
        return module, [image.permute(0, 3, 1, 2), mix_of(config, torch.device("cpu"))]

    return Part(
        lambda batch: build(own, batch, config.stem.build(config.in_chans, backend="triton")),
        lambda batch: build(timm, batch, FromPixels(timm_model(one_block(config)).patch_embed)),
        stem_bytes(config),
    )


def block(config: ViTConfig, ours: bool) -> Build:
    """One encoder block; ours has the attention op in Triton as one opaque call."""

    def build(batch: int) -> tuple[nn.Module, list[Tensor]]:
        if ours:
            backends = {"attention": "triton", "add_layer_norm": "torch", "bias_gelu": "torch"}
            layer = Block(config.width, config.heads, config.mlp_width, backend=backends)
        else:
            layer = timm_model(one_block(config)).blocks[0]
        module = _Autocast(lambda module, x: module.layer(x), layer=layer)
        return module, [_zeros(batch, config.tokens, config.width, dtype=torch.float32)]

    return build


def head(config: ViTConfig) -> Build:
    """Final LayerNorm, class token, linear head and cross-entropy."""

    def run(module: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(module.head(module.norm(tokens)[:, 0]).float(), labels)

    def build(batch: int) -> tuple[nn.Module, list[Tensor]]:
        layers = {"norm": nn.LayerNorm(config.width), "head": nn.Linear(config.width, config.num_classes)}
        tokens = _zeros(batch, config.tokens, config.width, dtype=torch.float32)
        return _Autocast(run, **layers), [tokens, torch.zeros(batch, dtype=torch.int64)]

    return build
