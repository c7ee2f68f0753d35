"""Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) of a batch with itself rolled by one sample.

A mix is five float32 numbers: the weight w inside a box, and the box's top, bottom, left and right in pixels. Mixup has
one w for the whole image, CutMix a box with w = 0. So each step runs the same graph; the model's stem mixes, see
`fastvitc.kernels.Pixels`.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Mixing:
    """Strengths (alpha of the Beta distribution) of mixup and CutMix; 0 turns one off. With both, each batch gets one
    of the two, with equal chance. `chance` is that of a batch to be mixed at all."""

    mixup: float = 0.8
    cutmix: float = 1.0
    chance: float = 1.0

    @property
    def enabled(self) -> bool:
        return (self.mixup > 0 or self.cutmix > 0) and self.chance > 0

    def sample(self, image_size: tuple[int, int], seed: tuple[int, ...]) -> Tensor:
        """A mix (5,) float32 for images of (height, width); a function of the seed."""
        height, width = image_size
        rng = np.random.default_rng(seed)
        if self.chance < 1 and rng.random() >= self.chance:
            return self.none(image_size)
        use_cutmix = self.cutmix > 0 and (self.mixup <= 0 or rng.random() < 0.5)
        share = rng.beta(*(self.cutmix if use_cutmix else self.mixup,) * 2)
        if not use_cutmix:
            return torch.tensor([share, 0, height, 0, width], dtype=torch.float32)
        half = 0.5 * (1.0 - share) ** 0.5
        y, x = rng.integers(height), rng.integers(width)
        rows = np.clip([y - half * height, y + half * height], 0, height).astype(int)
        columns = np.clip([x - half * width, x + half * width], 0, width).astype(int)
        return torch.tensor([0, *rows, *columns], dtype=torch.float32)

    @staticmethod
    def none(image_size: tuple[int, int]) -> Tensor:
        """The mix that leaves a batch as it is."""
        return torch.tensor([1, 0, image_size[0], 0, image_size[1]], dtype=torch.float32)


def share_of_own(mix: Tensor, image_size: tuple[int, int]) -> Tensor:
    """The share of the mixed images that comes from the unrolled ones: the mean of w over the image, a 0-d tensor.

    Args:
        mix: (5,) float32, its box inside the image.
        image_size: (height, width).
    """
    inside, top, bottom, left, right = mix.unbind()
    box = (bottom - top) * (right - left) / (image_size[0] * image_size[1])
    return inside * box + (1.0 - box)
