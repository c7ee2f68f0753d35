"""The interface of the loaders."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from fastvitc.data.augment import Augment
from fastvitc.data.index import ImageIndex
from fastvitc.data.sampling import batches_per_epoch, epoch_batches
from fastvitc.errors import UsageError


class Batch(NamedTuple):
    """images: uint8 (B, 3, H, W) in channels_last memory, RGB, not normalised. labels: int64 (B,)."""

    images: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class LoaderConfig:
    """What to load and how; see `create_loader`.

    Raises:
        UsageError: a value out of range, or fewer training images than one batch on each rank.
    """

    index: ImageIndex
    training: bool
    batch_size: int
    image_size: tuple[int, int]
    augment: Augment
    device: torch.device
    seed: int
    rank: int
    world_size: int
    workers: int
    crop_ratio: float

    def __post_init__(self) -> None:
        sides = self.image_size
        for wrong, complaint in (
            (self.batch_size < 1, f"batch_size must be at least 1, got {self.batch_size}"),
            (len(sides) != 2 or min(sides) < 1, f"image_size is (height, width) in pixels, got {sides}"),
            (self.seed < 0, f"seed must not be negative, got {self.seed}"),
            (
                not 0 <= self.rank < self.world_size,
                f"rank {self.rank} is none of the {self.world_size} ranks from 0",
            ),
            (self.workers < 0, f"workers must not be negative, got {self.workers}"),
            (not 0 < self.crop_ratio <= 1, f"crop_ratio is above 0 and at most 1, got {self.crop_ratio}"),
        ):
            if wrong:
                raise UsageError(complaint)
        images, needed = len(self.index), self.batch_size * self.world_size
        if self.training and images < needed:
            raise UsageError(
                f"{images} training images do not fill one batch of {self.batch_size} on each of "
                f"{self.world_size} ranks; make the batch smaller"
            )

    def counts(self) -> tuple[int, int]:
        """(batches, images) per epoch on this rank."""
        return batches_per_epoch(
            len(self.index),
            self.batch_size,
            training=self.training,
            rank=self.rank,
            world_size=self.world_size,
        )

    def batches(self, epoch: int) -> list[np.ndarray]:
        """The numbers of the images in each of this rank's batches."""
        return epoch_batches(
            len(self.index),
            self.batch_size,
            training=self.training,
            seed=self.seed,
            epoch=epoch,
            rank=self.rank,
            world_size=self.world_size,
        )


class Loader(ABC):
    """Yields one epoch of batches on the configured device each time it is iterated, one iteration at a time.

    The same epoch comes again until `set_epoch`; an iteration may be left early. Training batches are all full and
    equally many on each rank; evaluation yields each image once over all ranks, in a shorter last batch if need be.
    """

    def __init__(self, config: LoaderConfig) -> None:
        self.config = config
        self._epoch = 0

    @abstractmethod
    def __iter__(self) -> Iterator[Batch]:
        """One epoch.

        Raises:
            DataError: an image cannot be read; the message names it.
        """

    def __len__(self) -> int:
        """Batches per epoch on this rank."""
        return self.config.counts()[0]

    @property
    def num_samples(self) -> int:
        """Images per epoch on this rank."""
        return self.config.counts()[1]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (from 0) that the next iteration yields: its order and its augmentation."""
        self._epoch = epoch

    def close(self) -> None:  # noqa: B027 - not every loader holds anything
        """Release worker processes, threads and memory. Iterating again starts anew."""
