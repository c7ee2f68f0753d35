"""What a run goes on from: one file, written whole or not at all, and read without executing code."""

import zipfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvitc.errors import CheckpointError, UsageError
from fastvitc.files import write_atomically
from fastvitc.training.settings import TrainSettings

STATE = "state.pt"
_FORMAT = "fastvitc training state, 2"


@dataclass(frozen=True)
class RunState:
    """A run at the end of an epoch: numbers, text, tensors on the CPU, and containers of them.

    Attributes:
        epoch: epochs that are done.
        best: best validation top-1 so far, in percent.
        model, ema: weights and buffers of the model, and of its moving average where one is kept.
        optimizers: the state of each.
        settings: of the run, see `TrainSettings.to_dict`.
        classes: their names, in the order of the labels.
        world_size: number of processes.
        backends: what each op ran on.
    """

    epoch: int
    best: float
    model: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    optimizers: list[dict[str, Any]]
    settings: dict[str, Any]
    classes: list[str]
    world_size: int
    backends: dict[str, str]

    def save(self, path: Path) -> None:
        """Write the state to a file."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        write_atomically(path, lambda temporary: torch.save({"format": _FORMAT, **values}, temporary))

    @classmethod
    def load(cls, path: Path) -> "RunState":
        """The state at `path`, see `state_file`.

        Raises:
            CheckpointError: there is no such file, it is damaged, or it is another program's.
        """
        file = state_file(path)
        values = _read(file)
        wanted = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or values.pop("format", None) != _FORMAT or values.keys() != wanted:
            raise CheckpointError(
                f"{file} is not a training state of this version of fastvitc (expected format {_FORMAT!r})"
            )
        return cls(**values)

    def check_fits(self, settings: TrainSettings, classes: list[str], world_size: int) -> None:
        """Raise UsageError where a run of these settings, classes and processes cannot go on from here."""
        for what, then, now in (
            ("classes", self.classes, classes),
            ("number of processes", self.world_size, world_size),
        ):
            if then != now:
                raise UsageError(
                    f"a resumed run keeps its {what}: it was {then}, now {now}. Start another run instead"
                )
        if self.epoch >= settings.optimisation.epochs:
            raise UsageError(
                f"the run at {settings.run.resume} has finished its {self.epoch} epochs; "
                "ask for more with --epochs"
            )


def state_file(path: Path) -> Path:
    """The state at `path`: the file itself, or that of a run's folder or its last/.

    Raises:
        CheckpointError: there is none.
    """
    found = next((c for c in (path, path / "last" / STATE, path / STATE) if c.is_file()), None)
    if found is None:
        raise CheckpointError(
            f"nothing to resume at {path}: expected a run's output folder, its last/ folder or its {STATE}"
        )
    return found.absolute()


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
            f"{file} cannot be read as a training state: {reason}. It is damaged or another program's file; "
            "resume from another run, or start anew"
        ) from error
