"""What a run goes on from: one file, written whole or not at all, and read without executing code."""

import zipfile
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvitc.errors import CheckpointError
from fastvitc.files import write_atomically

CHECKPOINTS = "checkpoints"
#: The state before the first step: nothing is trained yet.
START = "epoch-00000-step-00000000.pt"
_FORMAT = "fastvitc training state, 4"


@dataclass(frozen=True)
class RunState:
    """A run between two optimiser steps: numbers, text, tensors on the CPU, and containers of them.

    Attributes:
        epoch: epochs that are trained and evaluated.
        step: optimiser steps of the next epoch that are done.
        best: best validation top-1 so far, in percent.
        rows: of summary.csv, one for each epoch.
        model, ema: weights and buffers of the model, and of its moving average where one is kept.
        optimizers: the state of each.
        processes: for each process what is its own, see `Parts.own_state`.
        settings: of the run, see `TrainSettings.to_dict`.
        classes: their names, in the order of the labels.
        backends: what each op ran on.
        data: a digest of what decides which images come in which order and how they look.
        lengths: the epochs that the run was to have, each with the epoch from which on, see `Schedule`.
        skipped: steps that are left out because they spoilt the weights, counted from the run's begin.
        rollbacks: how often in a row the run went back for that.
    """

    epoch: int
    step: int
    best: float
    rows: list[dict[str, Any]]
    model: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    optimizers: list[dict[str, Any]]
    processes: list[dict[str, Any]]
    settings: dict[str, Any]
    classes: list[str]
    backends: dict[str, str]
    data: str
    lengths: list[list[float]]
    skipped: list[int]
    rollbacks: int

    def file_in(self, folder: Path) -> Path:
        """Where a run's folder keeps this state."""
        return folder / CHECKPOINTS / f"epoch-{self.epoch:05d}-step-{self.step:08d}.pt"

    def save(self, path: Path) -> None:
        """Write the state to a file."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        write_atomically(path, lambda temporary: torch.save({"format": _FORMAT, **values}, temporary))

    @classmethod
    def load(cls, file: Path) -> "RunState":
        """The state in a file.

        Raises:
            CheckpointError: the file is damaged, or it is another program's.
        """
        values = _read(file)
        wanted = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or values.pop("format", None) != _FORMAT or values.keys() != wanted:
            raise CheckpointError(
                f"{file} is not a training state of this version of fastvitc (expected format {_FORMAT!r})"
            )
        return cls(**values)


def state_files(folder: Path) -> list[Path]:
    """The files of a run's states, the newest first."""
    return sorted((folder / CHECKPOINTS).glob("epoch-*-step-*.pt"), reverse=True)


def trained_states(folder: Path) -> list[Path]:
    """The files of the states in which something is trained, the newest first."""
    return [file for file in state_files(folder) if file.name != START]


def newest_state(path: Path, warn: Callable[[str], None] = print) -> tuple[Path, RunState]:
    """(the run's folder, its newest whole state); `path` is the folder, one in it, or a state's file.

    Damaged states are passed over with a warning.

    Raises:
        CheckpointError: there is no state, or no whole one.
    """
    if path.is_file():
        return path.absolute().parent.parent, RunState.load(path)
    folder = next((f for f in (path, path.parent) if state_files(f)), None)
    if folder is None:
        raise CheckpointError(
            f"nothing to resume at {path}: expected a run's output folder with {CHECKPOINTS}/ in it, or a file of those"
        )
    problems = []
    for file in state_files(folder):
        try:
            state = RunState.load(file)
        except CheckpointError as error:
            problems.append(str(error))
        else:
            for problem in problems:
                warn(f"warning: {problem}. The one before it is taken: {file.name}")
            return folder.absolute(), state
    raise CheckpointError(f"{folder} holds no whole state: {'; '.join(problems)}")


def on_host(value: Any) -> Any:
    """A copy of nested dictionaries and lists with their tensors in host memory, which nothing changes any more."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: on_host(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(on_host, value))
    return value


def _read(file: Path) -> Any:
    try:
        with zipfile.ZipFile(file) as records:
            damaged = records.testzip()  # torch.load does not look at the checksums
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} is wrong")
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever its parsing trips over
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{file} cannot be read as a training state: {reason}. It is damaged or another program's file"
        ) from error
