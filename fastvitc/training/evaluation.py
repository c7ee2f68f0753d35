"""The compiled evaluation, and precise BatchNorm statistics before it. The device is waited for once, at the end."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import nan

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvitc.models.vit import VisionTransformer
from fastvitc.training.process import Process
from fastvitc.training.step import compile_model
from fastvitc.tuning.machine import autocast


@dataclass(frozen=True)
class Accuracy:
    """Counts over an evaluated set and what follows from them."""

    images: int
    correct: int
    correct_top5: int
    loss: float

    @property
    def top1(self) -> float:
        """Percent of images whose first guess is right; nan where there are none."""
        return 100.0 * self.correct / self.images if self.images else nan

    @property
    def top5(self) -> float:
        """Percent of images whose class is among the first five guesses; nan where there are none."""
        return 100.0 * self.correct_top5 / self.images if self.images else nan


#: Of an epoch without a validation.
NOT_EVALUATED = Accuracy(0, 0, 0, nan)


class Evaluation(nn.Module):
    """From a uint8 batch to counts; labels of −1 mark padding and count as nothing."""

    def __init__(self, model: nn.Module, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """(B, C, H, W) uint8, (B,) int64 → (4,) float64: images, correct, correct in top 5, summed loss."""
        with autocast(images.device, self.dtype):
            logits = self.model(images)
        logits = logits.float()
        real = labels >= 0
        guesses = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = (guesses == labels.unsqueeze(1)) & real.unsqueeze(1)
        loss = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
        return torch.stack([real.sum(), hits[:, 0].sum(), hits.sum(), loss.double()]).double()


class Evaluator:
    """Evaluates models of one architecture, compiled once: partial batches are padded to `batch_size`."""

    def __init__(
        self,
        model: nn.Module,
        process: Process,
        *,
        dtype: torch.dtype,
        batch_size: int,
        compile: bool = True,
    ) -> None:
        self._evaluation = Evaluation(model, dtype=dtype).to(process.device)
        if compile:
            compile_model(model, self._evaluation)
        self._process, self._batch_size = process, batch_size

    @torch.no_grad()
    def __call__(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Accuracy:
        """(images, labels) batches of at most `batch_size` → accuracy over all processes."""
        self._evaluation.eval()
        totals = torch.zeros(4, dtype=torch.float64, device=self._process.device)
        for images, labels in batches:
            missing = self._batch_size - len(labels)
            if missing:
                images = torch.cat([images, images[:1].expand(missing, -1, -1, -1)])
                images = images.contiguous(memory_format=torch.channels_last)
                labels = F.pad(labels, (0, missing), value=-1)
            totals += self._evaluation(images, labels)
        count, correct, correct_top5, loss = self._process.sum(totals).tolist()
        return Accuracy(int(count), int(correct), int(correct_top5), loss / max(count, 1))


@torch.no_grad()
def precise_batch_norm(
    model: VisionTransformer, batches: Iterable[tuple[Tensor, Tensor]], *, dtype: torch.dtype
) -> None:
    """Replace BatchNorm's running statistics by their mean over batches with the weights held still.

    Only the stem is run: there is no BatchNorm elsewhere (Wu & Johnson 2021, section 3).
    """
    norms = model.stem.norms
    momenta = [norm.momentum for norm in norms]
    training = model.stem.training
    model.stem.train()
    try:
        for seen, (images, _) in enumerate(batches, start=1):
            for norm in norms:
                norm.momentum = 1.0 / seen
            with autocast(images.device, dtype):
                model.stem.forward(images)  # not worth a compilation
    finally:
        model.stem.train(training)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
