"""Parameter groups, optimisers, the learning-rate schedule and the moving average of the weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import cos, pi
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel

from fastvitc.errors import UsageError

OptimizerName = Literal["adamw", "sgd"]


def parameter_groups(
    model: nn.Module, weight_decay: float, *, lr: float = 1.0, layer_decay: float = 1.0
) -> list[dict]:
    """Groups of the parameters that are trained.

    Matrices, convolutions, class token and position embedding are decayed, biases and norms are not. Each layer below
    the head learns `layer_decay` times as fast as the one above it (Bao et al. 2022, BEiT, appendix); the stem, the
    class token and the position embedding are the lowest. A group's highest rate is its `initial_lr`.
    """
    groups: dict[tuple[bool, int], list[nn.Parameter]] = {}
    below = _below_the_head(model) if layer_decay != 1.0 else {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            exempt = parameter.ndim < 2 or name.endswith("bias")
            groups.setdefault((exempt, below.get(name, 0)), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": 0.0 if exempt else weight_decay,
            "initial_lr": lr * layer_decay**steps,
        }
        for (exempt, steps), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def _below_the_head(model: nn.Module) -> dict[str, int]:
    """How many layers each parameter is below the head, by its name."""
    depth = len(model.blocks)
    below = {}
    for name, _ in model.named_parameters():
        part, _, rest = name.partition(".")
        if part == "blocks":
            below[name] = depth - int(rest.partition(".")[0])
        else:
            below[name] = 0 if part in ("norm", "head") else depth + 1
    return below


def create_optimizers(
    model: nn.Module, name: OptimizerName, *, lr: float, weight_decay: float, layer_decay: float = 1.0
) -> list[Optimizer]:
    """AdamW (betas 0.9, 0.999) or SGD (Nesterov momentum 0.9), PyTorch's fused form, on `parameter_groups`.

    A list, so that an optimiser for some parameters can stand beside one for the rest. Each group keeps its highest
    rate as `initial_lr`; `set_rates` takes a share of it.
    """
    groups = parameter_groups(model, weight_decay, lr=lr, layer_decay=layer_decay)
    if name == "adamw":
        return [AdamW(groups, lr=lr, betas=(0.9, 0.999), fused=True)]
    if name == "sgd":
        return [SGD(groups, lr=lr, momentum=0.9, nesterov=True, fused=True)]
    raise UsageError(f'opt must be "adamw" or "sgd", got {name!r}')


def set_rates(optimizers: Sequence[Optimizer], share: float) -> None:
    """Give every group a share of its highest rate from the next step on."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = share * group["initial_lr"]


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a share of the highest: half-cosine from 1 to `end_factor`, times a linear warm-up from
    `warmup_factor` (paper, section 4).

    Attributes:
        epochs: of the run, as planned at its begin.
        changes: (epoch, epochs): from that epoch on the run was to have so many epochs. The rate goes on from where it
            was, and its fall ends with the run.
    """

    epochs: float
    warmup_epochs: float = 5.0
    warmup_factor: float = 0.1
    end_factor: float = 0.005
    changes: tuple[tuple[float, float], ...] = ()

    def at(self, epoch: float) -> float:
        """The share at a (fractional) epoch."""
        half_cosine = 0.5 * (1.0 + cos(pi * self._progress(epoch)))
        share = self.end_factor + (1.0 - self.end_factor) * half_cosine
        if epoch < self.warmup_epochs:
            progress = epoch / self.warmup_epochs
            share *= self.warmup_factor + (1.0 - self.warmup_factor) * progress
        return share

    def to_last(self, epochs: float, now: float) -> "Schedule":
        """This schedule for a run that is at the epoch `now` and is to have so many epochs."""
        planned = self.changes[-1][1] if self.changes else self.epochs
        return self if epochs == planned else replace(self, changes=(*self.changes, (now, epochs)))

    def _progress(self, epoch: float) -> float:
        """How far the fall has come, from 0 to 1."""
        progress = 0.0
        plans = [(0.0, self.epochs), *self.changes]
        for (start, end), (until, _) in zip(plans, [*self.changes, (epoch, 0.0)], strict=True):
            here = min(until, epoch) - start
            share = 1.0 if here >= end - start else max(here / (end - start), 0.0)
            progress += (1.0 - progress) * share
        return progress


class ModelEma:
    """Exponential moving average of a model's weights and buffers.

    Args:
        model: the model to follow; the average starts as a copy of it.
        rate: share of the new weights in an update.
        every: optimiser steps between updates.
        warmup_steps: until then an update is a plain copy.
    """

    def __init__(self, model: nn.Module, *, rate: float, every: int = 1, warmup_steps: int = 0) -> None:
        self._source, self._every, self._warmup_steps = model, every, warmup_steps
        self._average = AveragedModel(model, multi_avg_fn=_ema_of_rate(rate), use_buffers=True)
        self._average.n_averaged.fill_(1)  # it holds a copy already, or soon the weights of a resumed run

    @property
    def model(self) -> nn.Module:
        """The averaged model."""
        return self._average.module

    def update(self, step: int) -> None:
        """Take in the weights after optimiser step number `step`, counted from 0."""
        if step % self._every:
            return
        if step < self._warmup_steps:
            self._average.n_averaged.zero_()  # AveragedModel's first update copies
        self._average.update_parameters(self._source)


def paper_ema_rate(batch_size: int, epochs: float, every: int) -> float:
    """The rate of the paper's code for a total batch size: 1e-5 · batch/epochs · steps between updates."""
    return min(1.0, 1e-5 * batch_size / epochs * every)


def _ema_of_rate(rate: float) -> Callable[[list[Tensor], list[Tensor], Tensor | int], None]:
    @torch.no_grad()
    def update(averages: list[Tensor], currents: list[Tensor], _count: Tensor | int) -> None:
        for average, current in zip(averages, currents, strict=True):
            if average.is_floating_point():
                average.lerp_(current, rate)
            else:
                average.copy_(current)

    return update
