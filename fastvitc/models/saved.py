"""Saved models: a folder with `model.safetensors` and `config.json`. Every write is atomic."""

import json
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from fastvitc.errors import CheckpointError
from fastvitc.files import write_atomically
from fastvitc.kernels import Choice
from fastvitc.models.config import ViTConfig
from fastvitc.models.stems import STEMS
from fastvitc.models.vit import VisionTransformer

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def save_model(folder: Path, model: VisionTransformer, **notes: Any) -> None:
    """Write a model's weights and configuration into a folder; `notes` (JSON values) go into the configuration."""
    save_weights(folder, model.config, model.state_dict(), **notes)


def save_weights(folder: Path, config: ViTConfig, state: dict[str, Tensor], **notes: Any) -> None:
    """`save_model` of a model's configuration and state dict."""
    weights = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    stem_type = next(name for name, kind in STEMS.items() if type(config.stem) is kind)
    config = {"model": {**asdict(config), "stem_type": stem_type}, **notes}
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
    values = {**entry, "image_size": tuple(entry["image_size"])}
    stem = STEMS[values.pop("stem_type", "conv")]
    values["stem"] = stem(**{k: tuple(v) if isinstance(v, list) else v for k, v in entry["stem"].items()})
    return ViTConfig(**values)


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
