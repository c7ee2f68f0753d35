"""A few training steps of a small model, the same for every backend."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fastvitc import VisionTransformer, ViTConfig
from fastvitc.models.config import preset
from fastvitc.training.optim import create_optimizers
from fastvitc.training.process import Process
from fastvitc.training.step import TrainStep

NANO = replace(preset("vitc_nano"), num_classes=10)


def trained(
    batches: Sequence[tuple[Tensor, Tensor]],
    backend: str,
    optimizer: str,
    lr: float,
    *,
    dtype: torch.dtype = torch.float32,
    compile: bool = False,
    config: ViTConfig = NANO,
) -> tuple[list[float], VisionTransformer]:
    """(the loss of each batch of uint8 images and labels, the model after them)."""
    device = batches[0][0].device
    torch.manual_seed(0)
    model = VisionTransformer(config, backend=backend)
    torch.nn.init.normal_(model.head.weight, std=0.1)
    model = model.to(device, memory_format=torch.channels_last)
    step = TrainStep(
        model,
        create_optimizers(model, optimizer, lr=lr, weight_decay=0.05),
        Process(0, 1, device),
        dtype=dtype,
        compile=compile,
    )
    losses = []
    for images, labels in batches:
        losses.append(step([(images.contiguous(memory_format=torch.channels_last), labels, None)]).item())
    return losses, model
