"""The compiled training step: tensors in, a loss out. Nothing here waits for the device."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvitc.training.mix import share_of_own
from fastvitc.training.process import Process
from fastvitc.tuning.machine import autocast


def compiled_graphs() -> int:
    """How many graphs torch.compile has made in this process; constant once everything has run."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


class Objective(nn.Module):
    """From a uint8 batch to the training loss, as one graph: the model, which normalises and mixes, and cross-entropy.

    Args:
        model: called with images and a mix or None, gives logits.
        dtype: of autocast; float32 turns it off.
        label_smoothing: share of the target spread evenly over all classes (Szegedy et al. 2016, section 7).
    """

    def __init__(self, model: nn.Module, *, dtype: torch.dtype, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype
        self.label_smoothing = label_smoothing

    def forward(self, images: Tensor, labels: Tensor, mix: Tensor | None) -> Tensor:
        """images (B, C, H, W) uint8, labels (B,) int64, mix of `Mixing` (5,) or None → mean loss, 0-d float32."""
        with autocast(images.device, self.dtype):
            logits = self.model(images, mix)
        logits = logits.float()
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        if mix is None:
            return loss
        share = share_of_own(mix, images.shape[2:])
        other = F.cross_entropy(logits, labels.roll(1), label_smoothing=self.label_smoothing)
        return share * loss + (1.0 - share) * other


class TrainStep:
    """One optimiser step: forward, backward, clip, update.

    Args:
        model: called with images and a mix or None; its parameters get the gradients.
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
        """`accumulate` triples (images, labels, mix) → their mean loss, a 0-d tensor still on the device."""
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
