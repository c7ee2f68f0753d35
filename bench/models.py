"""Ours and the peers' models with equal weights, eager and compiled, for the contests."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from bench.peers import FromPixels, timm_model, torchvision_model
from fastvitc import VisionTransformer, convert
from fastvitc.kernels import availability
from fastvitc.models.config import ViTConfig
from fastvitc.training.mix import Mixing


def trained_like(config: ViTConfig, *, backend: str = "auto") -> VisionTransformer:
    """A model whose zeros are random, so that every weight matters to the output; the same at each call."""
    torch.manual_seed(0)
    model = VisionTransformer(config, backend=backend)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    for norm in model.stem.norms:
        nn.init.normal_(norm.running_mean, std=0.1)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return model


def _timm(config: ViTConfig) -> nn.Module:
    model = timm_model(config)
    model.load_state_dict(convert.to_timm(trained_like(config).state_dict()))
    return model


def _torchvision(config: ViTConfig) -> nn.Module:
    model = torchvision_model(config)
    model.load_state_dict(convert.to_torchvision(trained_like(config).state_dict()))
    return model


#: The peers with our weights, as their libraries call them: normalised images to logits.
PEERS: dict[str, Callable[[ViTConfig], nn.Module]] = {"timm": _timm, "torchvision": _torchvision}


def _from_pixels(peer: str, config: ViTConfig) -> nn.Module:
    return FromPixels(PEERS[peer](config))


#: Ours and the peers: called with uint8 images and a mix or None.
MODELS: dict[str, Callable[[ViTConfig], nn.Module]] = {
    "fastvitc": trained_like,
    **{peer: partial(_from_pixels, peer) for peer in PEERS},
}


def models(device: torch.device) -> dict[str, Callable[[ViTConfig], nn.Module]]:
    """`MODELS`, and ours on the Triton kernels where they run on the device."""
    found = dict(MODELS)
    obstacles = {op: own["triton"] for op, own in availability(device).items() if "triton" in own}
    if not any(obstacles.values()):
        found["fastvitc triton"] = partial(trained_like, backend=dict.fromkeys(obstacles, "triton"))
    return found


def image_batch(config: ViTConfig, batch_size: int, device: torch.device) -> torch.Tensor:
    """uint8 images (B, C, H, W) in channels_last memory; the same at each call."""
    torch.manual_seed(1)
    shape = (batch_size, config.in_chans, *config.image_size)
    images = torch.randint(256, shape, dtype=torch.uint8, device=device)
    return images.contiguous(memory_format=torch.channels_last)


def mix_of(config: ViTConfig, device: torch.device) -> torch.Tensor:
    """A mix (5,) of the images, mixup of the paper's strength; the same at each call."""
    return Mixing(mixup=0.8, cutmix=0.0).sample(config.image_size, (0,)).to(device)


def one_block(config: ViTConfig) -> ViTConfig:
    """The configuration with a single encoder block."""
    return replace(config, depth=1)
