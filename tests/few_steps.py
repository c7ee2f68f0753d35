"""A few training steps of the nano model, the same for every backend."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvitc import VisionTransformer, create_model
from fastvitc.training.optim import create_optimizers
from fastvitc.training.process import Process
from fastvitc.training.step import TrainStep


def trained(
    batches: Sequence[tuple[Tensor, Tensor]],
    backend: str,
    optimizer: str,
    lr: float,
    *,
    dtype: torch.dtype = torch.float32,
    compile: bool = False,
) -> tuple[list[float], VisionTransformer]:
    """(the loss of each batch of uint8 images (B, 3, 32, 32) and labels, the model after them)."""
    device = batches[0][0].device
    torch.manual_seed(0)
    model = create_model("vitc_nano", num_classes=10, backend=backend)
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
