"""The interface of the loaders.

To add a loader: a subclass of `Loader` in a module beside this one, its name in `LoaderKind`, and a line in
`create_loader`.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal, NamedTuple, get_args

import torch

from fastvitc.data.augment import Augment
from fastvitc.data.index import ImageIndex
from fastvitc.data.sampling import Order
from fastvitc.errors import DataError, UsageError
from fastvitc.ranges import at_least, check_ranges, share

InterpolationName = Literal["bilinear", "bicubic"]
NO_SPARE = "an image cannot be read, and neither can any that may replace it: all of the next batch"


class Batch(NamedTuple):
    """images: uint8 in channels_last memory, not normalised: RGB (B, 3, H, W), or grey (B, 1, H, W). labels: int64
    (B,), −1 for an image that could not be read."""

    images: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class LoaderConfig:
    """Which images are loaded, and how.

    Attributes:
        index: the images.
        training: shuffled full batches, augmented; else every image once, in order.
        batch_size: images of a batch on this rank.
        image_size: (height, width) in pixels.
        device: where the batches are to be.
        channels: 3 for RGB, 1 for grey.
        interpolation: how images are resized.
        augment: what training images undergo.
        crop_ratio: side of evaluation's centre crop over the side that the image is resized to.
        seed: fixes order and augmentation, from 0.
        rank, world_size: which share of the images this process gets.
        workers: PIL's processes (0: none) or DALI's threads; None takes `default_workers`.
        bad_share: what share of the images may be unreadable; any above 0 lets one be.

    Raises:
        UsageError: a value out of range, or fewer training images than one batch on each rank.
    """

    index: ImageIndex
    training: bool
    batch_size: Annotated[int, at_least(1)]
    image_size: Annotated[tuple[int, int], at_least(1)]
    device: torch.device
    channels: Literal[1, 3] = 3
    interpolation: InterpolationName = "bilinear"
    augment: Augment = field(default_factory=Augment)
    crop_ratio: Annotated[float, share(zero=False)] = 0.875
    seed: Annotated[int, at_least(0)] = 0
    rank: Annotated[int, at_least(0)] = 0
    world_size: int = 1
    workers: Annotated[int | None, at_least(0)] = None
    bad_share: Annotated[float, share()] = 0.01

    def __post_init__(self) -> None:
        # with the index of the GPU that "cuda" means
        object.__setattr__(self, "device", torch.empty(0, device=self.device).device)
        if self.workers is None:
            object.__setattr__(self, "workers", default_workers(self.device))
        check_ranges(self)
        if self.channels not in (1, 3) or self.interpolation not in get_args(InterpolationName):
            raise UsageError(
                f"channels must be 1 or 3 and interpolation one of {', '.join(get_args(InterpolationName))}, "
                f"got {self.channels} and {self.interpolation!r}"
            )
        if self.rank >= self.world_size:
            raise UsageError(f"rank {self.rank} is none of the {self.world_size} ranks from 0")
        images, needed = len(self.index), self.batch_size * self.world_size
        if self.training and images < needed:
            raise UsageError(
                f"{images} training images do not fill one batch of {self.batch_size} on each of "
                f"{self.world_size} ranks; make the batch smaller"
            )

    @property
    def order(self) -> Order:
        """How this rank goes through the images."""
        return Order(len(self.index), self.batch_size, self.training, self.seed, self.rank, self.world_size)


def default_workers(device: torch.device) -> int:
    """This process's share of the cores it may use; a quarter of that beside a model that trains on them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, share // 4 if device.type == "cpu" else share)


class Loader(ABC):
    """Yields an epoch of batches on the configured device each time it is iterated, one iteration at a time.

    The same epoch comes again until `seek`; an iteration may be left early. Training batches are all full and equally
    many on each rank; evaluation yields each image once over all ranks, in a shorter last batch if need be.

    An image that cannot be read is replaced in training, see `Samples`; in evaluation its label is −1. `bad` maps such
    images' numbers to the reason.
    """

    def __init__(self, config: LoaderConfig) -> None:
        self.config, self.order = config, config.order
        self._epoch = self._first = 0
        self.bad: dict[int, str] = {}

    @abstractmethod
    def __iter__(self) -> Iterator[Batch]:
        """The batches from where `seek` points to the end of the epoch.

        Raises:
            DataError: more images cannot be read than `bad_share` allows; the message names one.
        """

    def _set_aside(self, number: int, reason: str) -> None:
        """Note that an image cannot be read."""
        self.bad[number] = reason
        images, limit = len(self.config.index), self.config.bad_share
        allowed = max(1, int(limit * images / self.config.world_size)) if limit else 0
        if len(self.bad) > allowed:
            raise DataError(
                f"{len(self.bad)} of {images} images cannot be read, more than the allowed {allowed}; "
                f"replace them, or raise --bad-share. The last: {reason}"
            )

    def __len__(self) -> int:
        """Batches per epoch on this rank."""
        return self.order.batches

    @property
    def num_samples(self) -> int:
        """Images per epoch on this rank."""
        return self.order.samples

    def description(self) -> str:
        """What loads, and with how many processes or threads."""
        return type(self).__name__

    def version(self) -> str:
        """What decodes, with its version: another one may give other pixels."""
        return type(self).__name__

    def seek(self, epoch: int, batch: int = 0) -> None:
        """Choose where the next iteration begins: an epoch (its order and its augmentation), and a batch of it."""
        self._epoch, self._first = epoch, batch

    def resize(self, image_size: tuple[int, int]) -> None:
        """Yield images of (height, width) pixels from the next iteration on."""
        if image_size != self.config.image_size:
            self.close()
            self.config = replace(self.config, image_size=image_size)
            self._resized()

    def _resized(self) -> None:  # noqa: B027 - not every loader keeps anything of that size
        """Make anew what depends on `config.image_size`."""

    def close(self) -> None:  # noqa: B027 - not every loader holds anything
        """Release worker processes, threads and memory. Iterating again starts anew."""
