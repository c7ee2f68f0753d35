"""Where the figures of a run go besides its summary: TensorBoard, a log of JSON lines, Weights & Biases."""

import importlib.util
import json
import math
import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from fastvitc.errors import FastvitcError, UsageError
from fastvitc.files import write_atomically


class Board(Protocol):
    """Takes what a run tells. `kind` is "step" or "epoch"; `step` counts optimiser steps from the run's begin."""

    def figures(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Named figures after a step."""

    def text(self, line: str) -> None:
        """A line of the log."""

    def close(self) -> None:
        """Write what is still to be written."""


class TensorBoard:
    """Scalars named kind/figure, in the run's folder `tensorboard/`; those after step number `steps` are dropped."""

    def __init__(self, folder: Path, steps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=steps + 1 if steps else None)

    def figures(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if not math.isfinite(value):
                continue
            self._writer.add_scalar(f"{kind}/{name}", value, step)

    def text(self, line: str) -> None:
        pass

    def close(self) -> None:
        self._writer.close()


class JsonLines:
    """`log.jsonl`: an object a line, with `time` (seconds since 1970) and `kind` ("step", "epoch" or "text").

    A resumed run adds to the file, so steps that were done again are there twice. A figure that is not finite is null.
    """

    def __init__(self, folder: Path) -> None:
        self._file = (folder / "log.jsonl").open("ab+")
        if self._file.tell():
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":  # cut by a kill
                self._file.write(b"\n")

    def figures(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._write({"kind": kind, "step": step, **finite})

    def text(self, line: str) -> None:
        self._write({"kind": "text", "text": line})

    def close(self) -> None:
        self._file.close()

    def _write(self, values: Mapping[str, Any]) -> None:
        self._file.write(json.dumps({"time": round(time.time(), 3), **values}).encode() + b"\n")
        self._file.flush()


class WeightsAndBiases:
    """A run of a Weights & Biases project; a resumed run goes on in the same one.

    Raises:
        FastvitcError: it cannot be reached.
    """

    def __init__(self, folder: Path, project: str, settings: Mapping[str, Any]) -> None:
        import wandb  # an extra

        named = folder / "wandb" / "id"
        if not named.exists():
            write_atomically(named, lambda path: path.write_text(secrets.token_hex(8)))
        try:
            self._run = wandb.init(
                project=project,
                name=folder.name,
                id=named.read_text(),
                resume="allow",
                dir=folder,
                config=dict(settings),
            )
        except Exception as error:  # of its own kinds, and of the network's
            reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
            raise FastvitcError(
                f"cannot begin a Weights & Biases run: {reason}. Log in with `wandb login`, set WANDB_MODE=offline, "
                "or leave out --wandb"
            ) from error
        self._run.define_metric("*", step_metric="step")  # its own steps may not repeat

    def figures(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **{f"{kind}/{name}": value for name, value in values.items()}})

    def text(self, line: str) -> None:
        pass

    def close(self) -> None:
        self._run.finish()


def check_wandb(project: str | None) -> None:
    """Raise UsageError where a project is named, but Weights & Biases is not installed."""
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise UsageError("--wandb needs Weights & Biases: pip install 'fastvitc[wandb]', or leave it out")


def open_boards(folder: Path, steps: int, project: str | None, settings: Mapping[str, Any]) -> list[Board]:
    """The boards of a run that has done so many steps; `project` is of Weights & Biases, None for none."""
    boards: list[Board] = [TensorBoard(folder, steps), JsonLines(folder)]
    if project is not None:
        boards.append(WeightsAndBiases(folder, project, settings))
    return boards
