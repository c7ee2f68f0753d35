"""What the tests of fastvitc.convert share: small models with random weights, the routes and the peers."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from bench.peers import timm_model, torchvision_model
from fastvitc import CheckpointError, StemConfig, VisionTransformer, ViTConfig
from fastvitc import convert as cv

CONV = ViTConfig(
    StemConfig((4, 6, 8), (3, 3, 1), (2, 2, 1)), 8, 20, heads=2, depth=2, image_size=(16, 16), num_classes=5
)
PATCHIFY = replace(CONV, stem=StemConfig((8,), (4,), (4,)), depth=3)

ROUTES = {
    "pycls main": (cv.to_pycls, cv.from_pycls),
    "pycls vitconfigs": (lambda state: cv.to_pycls(state, generation="vitconfigs"), cv.from_pycls),
    "torchvision": (cv.to_torchvision, cv.from_torchvision),
    "timm": (cv.to_timm, cv.from_timm),
}
PEERS = {"timm": (timm_model, cv.from_timm), "torchvision": (torchvision_model, cv.from_torchvision)}


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter and statistic at random, of the scale that keeps activations near one."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor, std: float) -> Tensor:
        return torch.randn(tensor.shape, generator=generator) * std

    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("num_batches_tracked"):
                tensor.fill_(7)
            elif name.endswith("running_var"):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            elif tensor.dim() > 1:
                tensor.copy_(normal(tensor, tensor[0].numel() ** -0.5))
            else:
                tensor.copy_(1 + normal(tensor, 0.2) if name.endswith("weight") else normal(tensor, 0.2))
    return model


def model_of(config: ViTConfig, seed: int = 0) -> nn.Module:
    return randomise(VisionTransformer(config, backend="reference"), seed).eval()


def state_of(config: ViTConfig) -> dict[str, Tensor]:
    return dict(model_of(config).state_dict())


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert actual[key].dtype == tensor.dtype, key
        assert torch.equal(actual[key], tensor), key


def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def image_of(config: ViTConfig, batch: int = 2) -> Tensor:
    return torch.randn(batch, config.in_chans, *config.image_size, generator=torch.Generator().manual_seed(1))


def refusal(convert, state) -> str:
    with pytest.raises(CheckpointError) as caught:
        convert(state)
    return str(caught.value)
