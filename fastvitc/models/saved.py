"""Saved models: a folder with `model.safetensors` and `config.json`. Every write is atomic."""

import json
import textwrap
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from fastvitc.errors import CheckpointError
from fastvitc.files import write_atomically
from fastvitc.kernels import Choice
from fastvitc.models.config import ViTConfig, as_size
from fastvitc.models.stems import STEMS
from fastvitc.models.vit import VisionTransformer, resize_pos_embed

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
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}
    stem = STEMS[values.pop("stem_type", "conv")]
    values["stem"] = stem(**{k: tuple(v) if isinstance(v, list) else v for k, v in entry["stem"].items()})
    return ViTConfig(**values)


def load_model(
    folder: str | Path,
    *,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    backend: Choice = "auto",
) -> VisionTransformer:
    """The model that `save_model` wrote, in evaluation mode on the CPU.

    Args:
        folder: of the saved model.
        num_classes: another number of classes, for which the model gets a new head of zeros; 0 for none.
        image_size: another size in pixels; the position embedding is interpolated.
        backend: see `VisionTransformer`.

    Raises:
        CheckpointError: the folder is not a saved model, or its files are damaged or do not fit each other.
    """
    folder = model_folder(folder)
    entry = read_config(folder)["model"]
    try:
        config = _model_config(entry)
        changes = {} if num_classes is None else {"num_classes": num_classes}
        if image_size is not None:
            changes["image_size"] = as_size(image_size)
        model = VisionTransformer(replace(config, **changes), backend=backend)
        weights = load_file(folder / WEIGHTS)
        if image_size is not None:
            weights = _resized(weights, config, model.config)
        load_weights(
            model, weights if num_classes in (None, config.num_classes) else _with_head(weights, model)
        )
    except CheckpointError:
        raise
    except Exception as error:  # a foreign configuration may fail anywhere, a negative width in PyTorch
        raise CheckpointError(f"{folder} does not hold a whole saved model: {error}") from error
    return model.eval()


def begin_with(model: VisionTransformer, weights: dict[str, Tensor]) -> bool:
    """Load the weights that a model is to be trained on from; whether its head is new.

    A head for another number of classes stays as it is in the new model. A position embedding for another size is
    interpolated where it is of a square image. A model that averages its tokens leaves out the class token.

    Raises:
        CheckpointError: the weights do not fit otherwise.
    """
    weights = dict(weights)
    if model.config.pool == "mean" and "class_token" in weights:
        del weights["class_token"]
        weights["pos_embed"] = weights["pos_embed"][:, 1:]
    fitting = _with_head(weights, model)
    load_weights(model, fitting)
    return any(fitting[key] is not weights.get(key) for key in fitting if key.startswith("head."))


def _with_head(weights: dict[str, Tensor], model: VisionTransformer) -> dict[str, Tensor]:
    """The weights with the model's own head where theirs has another number of classes."""
    head = {f"head.{name}": value for name, value in model.head.state_dict().items()}
    if all(key in weights and weights[key].shape == value.shape for key, value in head.items()):
        head = {key: weights[key] for key in head}
    return {key: value for key, value in weights.items() if not key.startswith("head.")} | head


def _resized(weights: dict[str, Tensor], old: ViTConfig, new: ViTConfig) -> dict[str, Tensor]:
    prefix = int(old.pool == "token")
    return {**weights, "pos_embed": resize_pos_embed(weights["pos_embed"], old.grid, new.grid, prefix)}


def load_weights(model: VisionTransformer, weights: dict[str, Tensor]) -> None:
    """`load_state_dict` that raises CheckpointError with the keys that do not fit."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = textwrap.shorten(str(error), 600)  # one line of what lists every key
        raise CheckpointError(f"these weights do not fit the model: {reason}") from error
