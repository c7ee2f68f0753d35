"""Saved models (weights and configuration) and the state a run resumes from. Every write is atomic.

A model is a folder with `model.safetensors` and `config.json`; a run's state is one file, read without unpickling
code.
"""

import json
import textwrap
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from fastvitc.config import StemConfig, ViTConfig
from fastvitc.errors import CheckpointError
from fastvitc.files import write_atomically
from fastvitc.kernels import Choice
from fastvitc.model import VisionTransformer

WEIGHTS, CONFIG, STATE = "model.safetensors", "config.json", "state.pt"
_FORMAT = "fastvitc training state, 1"


def save_model(folder: Path, model: VisionTransformer, **notes: Any) -> None:
    """Write a model's weights and configuration into a folder; `notes` (JSON values) go into the configuration."""
    weights = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    config = {"model": asdict(model.config), **notes}
    write_atomically(folder / WEIGHTS, lambda path: path.write_bytes(save(weights)))
    write_atomically(folder / CONFIG, lambda path: path.write_text(json.dumps(config, indent=2) + "\n"))


def model_folder(path: str | Path) -> Path:
    """The folder of a saved model, named itself or by its weights."""
    path = Path(path)
    if (path / "best" / CONFIG).exists() and not (path / CONFIG).exists():
        raise CheckpointError(f"{path} is a run, not a saved model; name its best/ or last/ folder")
    return path.parent if path.name == WEIGHTS else path


def read_config(folder: Path) -> dict[str, Any]:
    """The contents of a saved model's config.json."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder} is not a saved model: cannot read {path} ({error}); expected a folder with {WEIGHTS} and "
            f"{CONFIG}, as training writes it"
        ) from error
    if not isinstance(config, dict) or "model" not in config:
        raise CheckpointError(f"{path} is not a model configuration of this library: it has no entry 'model'")
    return config


def _model_config(entry: dict[str, Any]) -> ViTConfig:
    stem = StemConfig(**{key: tuple(value) for key, value in entry["stem"].items()})
    return ViTConfig(**{**entry, "stem": stem, "image_size": tuple(entry["image_size"])})


def load_model(folder: str | Path, *, backend: Choice = "auto") -> VisionTransformer:
    """The model that `save_model` wrote, in evaluation mode on the CPU.

    Raises:
        CheckpointError: the folder is not a saved model, or its files are damaged or do not fit each other.
    """
    folder = model_folder(folder)
    entry = read_config(folder)["model"]
    try:
        model = VisionTransformer(_model_config(entry), backend=backend)
        load_weights(model, load_file(folder / WEIGHTS))
    except CheckpointError:
        raise
    except Exception as error:  # a foreign configuration may fail anywhere, a negative width in PyTorch
        raise CheckpointError(f"{folder} does not hold a whole saved model: {error}") from error
    return model.eval()


def load_weights(model: VisionTransformer, weights: dict[str, Tensor]) -> None:
    """`load_state_dict` that raises CheckpointError with the keys that do not fit."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = textwrap.shorten(str(error), 600)  # one line of what lists every key
        raise CheckpointError(f"these weights do not fit the model: {reason}") from error


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
