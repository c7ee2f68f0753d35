"""Images from disk to the device, as uint8: the index, the order of an epoch, augmentation, and the loaders."""

import importlib.util
import os
from typing import Literal, get_args

import torch

from fastvitc.data.augment import Augment
from fastvitc.data.base import Batch, Loader, LoaderConfig
from fastvitc.data.digits import digits_folder
from fastvitc.data.index import ImageIndex, index_folder, index_split, synthetic_index
from fastvitc.data.pil import PilLoader
from fastvitc.data.policy import PolicyName
from fastvitc.data.synthetic import SyntheticLoader
from fastvitc.errors import UsageError

__all__ = [
    "Augment",
    "Batch",
    "ImageIndex",
    "Loader",
    "LoaderKind",
    "PolicyName",
    "create_loader",
    "digits_folder",
    "index_folder",
    "index_split",
    "synthetic_index",
]

LoaderKind = Literal["auto", "dali", "pil", "synthetic"]


def create_loader(
    kind: LoaderKind,
    index: ImageIndex,
    *,
    training: bool,
    batch_size: int,
    image_size: tuple[int, int],
    device: torch.device | str,
    augment: Augment | None = None,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    workers: int | None = None,
    crop_ratio: float = 0.875,
) -> Loader:
    """A loader of `index`'s images, random crops in training and centre crops in evaluation.

    All kinds yield the same images in the same order, up to rounding; see `fastvitc.data.augment` for the geometry.

    Args:
        kind: `dali`, `pil`, `synthetic` (random pixels), or `auto`: DALI on a CUDA device where it is installed, for
            it decodes there; else PIL, which on a CPU is as fast.
        training: shuffled full batches, augmented; else every image once, in order.
        batch_size: images per batch on this rank.
        image_size: (height, width) in pixels.
        device: where the batches are to be.
        augment: what training images undergo; by default `Augment()`.
        seed: fixes order and augmentation, from 0.
        rank, world_size: which share of the images this process gets.
        workers: PIL's processes (0: none) or DALI's threads; see `default_workers`.
        crop_ratio: side of evaluation's centre crop over the side the image is resized to.

    Raises:
        UsageError: a value out of range, fewer training images than one batch on each rank, DALI not installed, or
            no image files for a loader that reads them.
    """
    device = torch.empty(0, device=device).device  # with the index of the GPU that "cuda" means
    if kind not in get_args(LoaderKind):
        raise UsageError(f"there is no loader {kind!r}; choose among {', '.join(get_args(LoaderKind))}")
    if kind == "auto":
        kind = "dali" if device.type == "cuda" and _has_dali() else "pil"
    config = LoaderConfig(
        index=index,
        training=training,
        batch_size=batch_size,
        image_size=image_size,
        augment=Augment() if augment is None else augment,
        device=device,
        seed=seed,
        rank=rank,
        world_size=world_size,
        workers=default_workers(device) if workers is None else workers,
        crop_ratio=crop_ratio,
    )
    if kind == "synthetic":
        return SyntheticLoader(config)
    if not index.paths:
        raise UsageError(
            f"the {kind} loader reads files, and this index names none; choose the loader synthetic"
        )
    if kind == "pil":
        return PilLoader(config)
    from fastvitc.data.dali import DaliLoader  # only here: DALI need not be installed

    return DaliLoader(config)


def default_workers(device: torch.device) -> int:
    """This process's share of the cores it may use; a quarter of that beside a model that trains on them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, share // 4 if device.type == "cpu" else share)


def _has_dali() -> bool:
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False
