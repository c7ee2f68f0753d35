"""Random images without disk or decoding: the speed that no loader can beat."""

from collections.abc import Iterator

import numpy as np
import torch

from fastvitc.data.base import Batch, Loader, LoaderConfig


class SyntheticLoader(Loader):
    """One batch of random pixels on the device, drawn from the seed and yielded again and again.

    Order, labels and counts are the index's, as with any loader; the pixels have nothing to do with them.
    """

    def __init__(self, config: LoaderConfig) -> None:
        super().__init__(config)
        self._draw()

    def _resized(self) -> None:
        self._draw()

    def _draw(self) -> None:
        config = self.config
        generator = torch.Generator().manual_seed(config.seed + config.rank)
        shape = (config.batch_size, *config.image_size, config.channels)
        pixels = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        self._images = pixels.to(config.device).permute(0, 3, 1, 2)

    def __iter__(self) -> Iterator[Batch]:
        for samples, _ in self.order.epoch(self._epoch, self._first):
            labels = torch.from_numpy(self.config.index.labels[samples].astype(np.int64))
            yield Batch(self._images[: len(samples)], labels.to(self.config.device, non_blocking=True))
