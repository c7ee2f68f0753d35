"""The compiled training step: tensors in, a loss out. Nothing here waits for the device."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvitc.models.stems import IMAGENET_MEAN, IMAGENET_STD
from fastvitc.models.vit import VisionTransformer
from fastvitc.training.mix import mix_images
from fastvitc.training.process import Process
from fastvitc.tuning.machine import autocast


def compiled_graphs() -> int:
    """How many graphs torch.compile has made in this process; constant once everything has run."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


class Normalize(nn.Module):
    """uint8 images to normalised float32: (x/255 − mean)/std per channel."""

    def __init__(self, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> None:
        super().__init__()
        self.register_buffer("mean", 255.0 * torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", 255.0 * torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) uint8 → the same shape, float32."""
        return (images.float() - self.mean) / self.std


def input_of(model: nn.Module) -> nn.Module:
    """What makes the model's input of uint8 images: nothing for ours, whose stem reads them, else `Normalize`."""
    return nn.Identity() if isinstance(model, VisionTransformer) else Normalize()


class Objective(nn.Module):
    """From a uint8 batch to the training loss, as one graph: normalise, mix, model, cross-entropy.

    Args:
        model: images to logits.
        dtype: of autocast; float32 turns it off.
        label_smoothing: share of the target spread evenly over all classes (Szegedy et al. 2016, section 7).
    """

    def __init__(self, model: nn.Module, *, dtype: torch.dtype, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.normalize, self.input = Normalize(), input_of(model)
        self.model = model
        self.dtype = dtype
        self.label_smoothing = label_smoothing

    def forward(self, images: Tensor, labels: Tensor, draw: Tensor | None) -> Tensor:
        """images (B, C, H, W) uint8, labels (B,) int64, draw of `Mix` (5,) or None → mean loss, 0-d float32."""
        share = None
        if draw is None:
            x = self.input(images)
        else:
            x, share = mix_images(self.normalize(images), draw)
        with autocast(x.device, self.dtype):
            logits = self.model(x)
        logits = logits.float()
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        if share is None:
            return loss
        other = F.cross_entropy(logits, labels.roll(1), label_smoothing=self.label_smoothing)
        return share * loss + (1.0 - share) * other


class TrainStep:
    """One optimiser step: forward, backward, clip, update.

    Args:
        model: the model; its parameters get the gradients.
        optimizers: over the model's parameters.
        process: this process; with several, gradients are averaged over them (BatchNorm statistics are not shared).
        dtype: of autocast; float32 turns it off.
        label_smoothing: see `Objective`.
        accumulate: batches per optimiser step.
        clip_grad: largest norm of the whole gradient; None for no clipping.
        compile: whether torch.compile makes one graph of `Objective` and one of its backward.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        process: Process,
        *,
        dtype: torch.dtype,
        label_smoothing: float = 0.0,
        accumulate: int = 1,
        clip_grad: float | None = None,
        compile: bool = True,
    ) -> None:
        objective = Objective(model, dtype=dtype, label_smoothing=label_smoothing).to(process.device)
        if compile:
            objective.compile(fullgraph=True, dynamic=False)
        self.objective = objective
        self._model, self._optimizers, self._process = model, optimizers, process
        self._accumulate, self._clip_grad = accumulate, clip_grad

    def __call__(self, batches: Sequence[tuple[Tensor, Tensor, Tensor | None]]) -> Tensor:
        """`accumulate` triples (images, labels, draw) → their mean loss, a 0-d tensor still on the device."""
        self._model.train()
        total: Tensor | None = None
        for batch in batches:
            loss = self.objective(*batch) / self._accumulate
            loss.backward()
            total = loss.detach() if total is None else total + loss.detach()
        # After the whole backward: overlapping the two would cut the compiled graph into pieces.
        self._process.average_gradients(self._model)
        if self._clip_grad is not None:
            nn.utils.clip_grad_norm_(self._model.parameters(), self._clip_grad)
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        assert total is not None
        return total
