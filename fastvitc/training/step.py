"""The training step: tensors in, a loss out. Nothing here waits for the device, but fp16 with Muon or clipping."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastvitc.models.vit import VisionTransformer
from fastvitc.training.compilation import unchanged
from fastvitc.training.mix import share_of_own
from fastvitc.training.process import Process
from fastvitc.tuning.machine import autocast


def compiled_graphs() -> int:
    """How many graphs torch.compile has made in this process; constant once everything has run."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def compile_model(model: nn.Module, whole: nn.Module) -> None:
    """torch.compile a model of this library in its parts, any other as one graph with `whole`, the module around it."""
    torch._dynamo.config.recompile_limit = 64  # all modules' calls count together
    torch._dynamo.config.optimize_ddp = False  # it would cut the parts' graphs where messages are to begin
    if isinstance(model, VisionTransformer):
        model.compile_parts()
    else:
        whole.compile(fullgraph=True, dynamic=False)


class Objective(nn.Module):
    """From a uint8 batch to the training loss: the model, which normalises and mixes, and cross-entropy.

    Args:
        model: called with images and a mix or None, gives logits.
        dtype: of autocast; float32 turns it off.
        label_smoothing: share of the target spread evenly over all classes (Szegedy et al. 2016, section 7).
        bce: take the mean binary cross-entropy of the classes, each by itself, over the same target.
    """

    def __init__(
        self, model: nn.Module, *, dtype: torch.dtype, label_smoothing: float = 0.0, bce: bool = False
    ) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype
        self.label_smoothing = label_smoothing
        self.bce = bce

    def forward(self, images: Tensor, labels: Tensor, mix: Tensor | None) -> Tensor:
        """images (B, C, H, W) uint8, labels (B,) int64, mix of `Mixing` (5,) or None → mean loss, 0-d float32."""
        with autocast(images.device, self.dtype):
            logits = self.model(images, mix)
        logits = logits.float()
        loss = self._loss(logits, labels)
        if mix is None:
            return loss
        share = share_of_own(mix, images.shape[2:])
        return share * loss + (1.0 - share) * self._loss(logits, labels.roll(1))

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if not self.bce:
            return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        classes = logits.shape[1]
        target = F.one_hot(labels, classes) * (1.0 - self.label_smoothing) + self.label_smoothing / classes
        return F.binary_cross_entropy_with_logits(logits, target)


class TrainStep:
    """One optimiser step: forward, backward, clip, update.

    Args:
        model: called with images and a mix or None; its parameters get the gradients.
        optimizers: over the model's parameters.
        process: this process; with several, DistributedDataParallel gives all the main one's weights and averages the
            gradients during the last batch's backward pass (only nn.SyncBatchNorm shares statistics).
        dtype: of autocast; float32 turns it off.
        label_smoothing, bce: see `Objective`.
        accumulate: batches per optimiser step.
        clip_grad: largest norm of the whole gradient; None for no clipping.
        compile: whether the model is compiled, see `compile_model`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        process: Process,
        *,
        dtype: torch.dtype,
        label_smoothing: float = 0.0,
        bce: bool = False,
        accumulate: int = 1,
        clip_grad: float | None = None,
        compile: bool = True,
    ) -> None:
        objective = Objective(model, dtype=dtype, label_smoothing=label_smoothing, bce=bce).to(process.device)
        if compile:
            compile_model(model, objective)
        self.objective = objective
        self._parallel = None
        if process.world_size > 1:
            self._parallel = DistributedDataParallel(objective, gradient_as_bucket_view=True)
            # Statistics stay each process's own. Not by an argument: its name depends on PyTorch's version.
            self._parallel.broadcast_buffers = False
        self._settled = self._parallel is None
        #: Scales the loss under float16, where small gradients would be zero (Micikevicius et al. 2018).
        self.scaler = torch.amp.GradScaler(process.device.type, enabled=dtype == torch.float16)
        self._model, self._optimizers = model, optimizers
        self._accumulate, self._clip_grad = accumulate, clip_grad

    def __call__(self, batches: Sequence[tuple[Tensor, Tensor, Tensor | None]]) -> Tensor:
        """`accumulate` triples (images, labels, mix) → their mean loss, a 0-d tensor still on the device."""
        self._model.train()
        if not self._settled:
            self._settle(batches[0])
        total: Tensor | None = None
        for number, batch in enumerate(batches, start=1):
            with self._messages(last=number == len(batches)):
                loss = (self._parallel or self.objective)(*batch) / self._accumulate
                self.scaler.scale(loss).backward()
            total = loss.detach() if total is None else total + loss.detach()
        if self._clip_grad is not None:
            for optimizer in self._optimizers:
                self.scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(self._model.parameters(), self._clip_grad)
        for optimizer in self._optimizers:
            self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        assert total is not None
        return total

    def _messages(self, last: bool) -> AbstractContextManager[None]:
        """Gradients are averaged in the last of the accumulated batches alone."""
        return nullcontext() if last or self._parallel is None else self._parallel.no_sync()

    def _settle(self, batch: tuple[Tensor, Tensor, Tensor | None]) -> None:
        """One backward pass that changes nothing: after its first, DistributedDataParallel packs gradients anew.

        Without it the first step of a resumed run would sum in another order than that step of the whole run.
        """
        with unchanged(self.objective, batch[0].device):
            self._parallel(*batch).backward()
        self._settled = True
