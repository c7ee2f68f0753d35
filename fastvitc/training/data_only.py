"""How fast the training loader is alone, without a model that it could wait for."""

import time
from dataclasses import dataclass

import torch

from fastvitc.data import ImageIndex, Loader
from fastvitc.training.assembly import loader_of
from fastvitc.training.process import Process
from fastvitc.training.settings import TrainSettings
from fastvitc.training.words import explain_loader


@dataclass(frozen=True)
class _Loading:
    """What one process has loaded: images, those that cannot be read, seconds to the first batch, images per second."""

    images: int
    bad: int
    first: float
    rate: float


def data_only(settings: TrainSettings, process: Process, train: ImageIndex) -> list[str]:
    """Load training images for --data-only seconds or an epoch; what there is to tell of all processes."""
    loader = loader_of(settings, process, train, training=True)
    try:
        found = process.gather(_load(loader, settings.run.data_only))
    finally:
        loader.close()
    images, bad = sum(f.images for f in found), sum(f.bad for f in found)
    return [
        f"data: {len(train):,} training images in {len(train.classes)} classes, "
        f"{explain_loader(loader, settings.data.loader)}",
        f"loaded {images:,} images with {process.world_size} processes, the first batch after "
        f"{max(f.first for f in found):.1f} s: {sum(f.rate for f in found):,.0f} images/s",
        f"{bad:,} images cannot be read ({bad / images:.2%} of those loaded)",
    ]


def _load(loader: Loader, seconds: float) -> _Loading:
    """Batches until the time is up, of one epoch. The rate leaves out the first, which waits for workers to start."""
    device, start = loader.config.device, time.perf_counter()
    batches, later = iter(loader), 0
    size = len(next(batches).labels)
    first = _now(device) - start
    for _ in batches:
        later += size
        if time.perf_counter() - start >= seconds:
            break
    took = _now(device) - start
    rate = later / (took - first) if later else size / took
    return _Loading(size + later, len(loader.bad), first, rate)


def _now(device: torch.device) -> float:
    """The time when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
