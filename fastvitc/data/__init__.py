"""Images from disk to the device, as uint8: the index, the order of an epoch, augmentation, and the loaders."""

import importlib.util
from typing import Literal, get_args

import torch

from fastvitc.data.augment import Augment
from fastvitc.data.base import Batch, InterpolationName, Loader, LoaderConfig
from fastvitc.data.digits import digits_folder
from fastvitc.data.index import ImageIndex, synthetic_index
from fastvitc.data.layout import (
    index_folder,
    index_place,
    index_split,
    read_class_names,
    read_index,
    write_index,
)
from fastvitc.data.pil import PilLoader
from fastvitc.data.policy import PolicyName
from fastvitc.data.synthetic import SyntheticLoader
from fastvitc.errors import UsageError

__all__ = [
    "Augment",
    "Batch",
    "ImageIndex",
    "InterpolationName",
    "Loader",
    "LoaderConfig",
    "LoaderKind",
    "PolicyName",
    "choose_loader",
    "create_loader",
    "digits_folder",
    "index_folder",
    "index_place",
    "index_split",
    "read_class_names",
    "read_index",
    "synthetic_index",
    "write_index",
]

LoaderKind = Literal["auto", "dali", "pil", "synthetic"]


def create_loader(kind: LoaderKind, config: LoaderConfig) -> Loader:
    """A loader of images: random crops in training, centre crops in evaluation.

    All kinds yield the same images in the same order, up to rounding; see `fastvitc.data.augment` for the geometry.

    Args:
        kind: `dali`, `pil`, `synthetic` (random pixels), or `auto`: DALI on a CUDA device where it is installed, for
            it decodes there; else PIL, which on a CPU is as fast.
        config: which images, and how.

    Raises:
        UsageError: DALI is not installed, or there are no images for a loader that reads them.
    """
    if kind not in get_args(LoaderKind):
        raise UsageError(f"there is no loader {kind!r}; choose among {', '.join(get_args(LoaderKind))}")
    kind, _ = choose_loader(kind, config.device)
    if kind == "synthetic":
        return SyntheticLoader(config)
    if config.index.source is None:
        raise UsageError(
            f"the {kind} loader reads images, and this index has none; choose the loader synthetic"
        )
    if kind == "pil":
        return PilLoader(config)
    from fastvitc.data.dali import DaliLoader  # only here: DALI need not be installed

    return DaliLoader(config)


def choose_loader(kind: LoaderKind, device: torch.device) -> tuple[LoaderKind, str]:
    """(the kind that `auto` stands for on a device, or the one given; why it is that)."""
    if kind != "auto":
        return kind, "as given"
    if device.type != "cuda":
        return "pil", "auto takes it on a CPU"
    return ("dali", "auto takes it on a GPU") if _has_dali() else ("pil", "DALI is not installed")


def _has_dali() -> bool:
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False
