"""Parameter groups, optimisers and the moving average of the weights."""

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Muon, Optimizer
from torch.optim.swa_utils import AveragedModel

from fastvitc.errors import UsageError

OptimizerName = Literal["adamw", "sgd", "muon"]


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
    model: nn.Module,
    name: OptimizerName,
    *,
    lr: float,
    weight_decay: float,
    layer_decay: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    momentum: float = 0.9,
) -> list[Optimizer]:
    """The optimisers of `parameter_groups`, in PyTorch's fused form where there is one.

    Each group keeps its highest rate as `initial_lr`; `set_rates` takes a share of it.

    Args:
        name: "adamw", with `betas` and `eps`; "sgd", Nesterov's, with `momentum`; or "muon" (Jordan et al. 2024), with
            `momentum`, for the matrices of the blocks, and AdamW for the rest. Muon's updates are scaled to those of
            AdamW (Liu et al. 2025, equation 4), so both take the same learning rate and weight decay.

    Raises:
        UsageError: another name.
    """
    groups = parameter_groups(model, weight_decay, lr=lr, layer_decay=layer_decay)
    if name == "adamw":
        return [AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)]
    if name == "sgd":
        return [SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0, fused=True)]
    if name == "muon":
        in_blocks = {
            id(matrix) for matrix in getattr(model, "blocks", nn.Module()).parameters() if matrix.ndim == 2
        }
        matrices = _part_of(groups, in_blocks.__contains__)
        rest = _part_of(groups, lambda parameter: parameter not in in_blocks)
        if not matrices:
            raise UsageError(
                "muon is for the matrices of a model's blocks, and none of them is trained; use adamw"
            )
        muon = Muon(matrices, lr=lr, momentum=momentum, adjust_lr_fn="match_rms_adamw")
        return [muon, AdamW(rest, lr=lr, betas=betas, eps=eps, fused=True)]
    raise UsageError(f"opt must be one of {', '.join(get_args(OptimizerName))}, got {name!r}")


def _part_of(groups: Sequence[dict], wanted: Callable[[int], bool]) -> list[dict]:
    """The groups with those of their parameters that are wanted, by their identity."""
    parts = [{**group, "params": [p for p in group["params"] if wanted(id(p))]} for group in groups]
    return [part for part in parts if part["params"]]


def set_rates(optimizers: Sequence[Optimizer], share: float) -> None:
    """Give every group a share of its highest rate from the next step on."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = share * group["initial_lr"]


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
