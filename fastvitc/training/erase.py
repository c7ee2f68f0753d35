"""Random erasing (Zhong et al. 2020): a rectangle of an image is replaced by random pixels."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_AREA = (0.02, 1 / 3)  # of the image
_ASPECT = (0.3, 1 / 0.3)  # height over width
_ATTEMPTS = 10


@dataclass(frozen=True)
class Erasing:
    """Erases a rectangle of each image with this chance: 2% to a third of the area (the paper's range is 2 to 40%,
    timm's this one), its height over its width from 0.3 to 3.3."""

    chance: float = 0.0

    def __call__(self, images: Tensor, seed: tuple[int, ...]) -> Tensor:
        """The images, uint8 (B, C, H, W), with what is erased; which and where are a function of the seed."""
        if not self.chance:
            return images
        rng = np.random.default_rng(seed)
        chosen = np.flatnonzero(rng.random(len(images)) < self.chance)
        images = images.clone()
        for number in chosen:
            top, left, height, width = self._rectangle(rng, images.shape[2:])
            shape = images.shape[1], height, width
            noise = torch.from_numpy(rng.integers(256, size=shape, dtype=np.uint8))
            images[number, :, top : top + height, left : left + width] = noise.to(
                images.device, non_blocking=True
            )
        return images

    @staticmethod
    def _rectangle(rng: np.random.Generator, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """(top, left, height, width) in pixels; an empty one where no attempt fits."""
        for _ in range(_ATTEMPTS):
            area = rng.uniform(*_AREA) * size[0] * size[1]
            aspect = np.exp(rng.uniform(*np.log(_ASPECT)))
            height, width = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
            if 0 < height < size[0] and 0 < width < size[1]:
                return rng.integers(size[0] - height), rng.integers(size[1] - width), height, width
        return 0, 0, 0, 0
