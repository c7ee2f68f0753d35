"""The state a run resumes from: one file, written atomically and read without executing code."""

import zipfile
from pathlib import Path
from typing import Any

import torch

from fastvitc.errors import CheckpointError
from fastvitc.files import write_atomically

STATE = "state.pt"
_FORMAT = "fastvitc training state, 1"


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a run's state: tensors, numbers, strings and containers of them."""
    write_atomically(path, lambda temporary: torch.save({"format": _FORMAT, **state}, temporary))


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


def load_state(path: Path) -> dict[str, Any]:
    """The state that `save_state` wrote, on the CPU; `path` may be the run's folder.

    Raises:
        CheckpointError: there is no such file, it is damaged, or it is another program's.
    """
    file = state_file(path)
    try:
        with zipfile.ZipFile(file) as records:
            damaged = records.testzip()  # torch.load does not look at the checksums
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} is wrong")
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever its parsing trips over
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{file} cannot be read as a training state: {reason}. It is damaged or another program's file; "
            "resume from another run, or start anew"
        ) from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise CheckpointError(
            f"{file} is not a training state of this version of fastvitc (expected format {_FORMAT!r})"
        )
    return state
