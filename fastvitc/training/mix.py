"""Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) on the device, inside the compiled step.

One batch is mixed with itself rolled by one sample. Both methods are one formula, y = w·x + (1 − w)·roll(x), with w
constant over the image (mixup) or zero inside a box and one outside (CutMix). A draw is five numbers, so that each
step runs the same graph.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Mix:
    """Strengths (alpha of the Beta distribution) of mixup and CutMix; 0 turns one off, with both one is drawn
    per batch with equal chance."""

    mixup: float = 0.8
    cutmix: float = 1.0

    @property
    def enabled(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    def draw(self, image_size: tuple[int, int], seed: tuple[int, ...]) -> Tensor:
        """(5,) float32: weight inside the box, and its top, bottom, left, right in pixels. A function of the seed."""
        height, width = image_size
        rng = np.random.default_rng(seed)
        use_cutmix = self.cutmix > 0 and (self.mixup <= 0 or rng.random() < 0.5)
        share = rng.beta(*(self.cutmix if use_cutmix else self.mixup,) * 2)
        if not use_cutmix:
            return torch.tensor([share, 0, height, 0, width], dtype=torch.float32)
        half = 0.5 * (1.0 - share) ** 0.5
        y, x = rng.integers(height), rng.integers(width)
        rows = np.clip([y - half * height, y + half * height], 0, height).astype(int)
        columns = np.clip([x - half * width, x + half * width], 0, width).astype(int)
        return torch.tensor([0, *rows, *columns], dtype=torch.float32)


def mix_images(images: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
    """(B, C, H, W) float and a draw → the mixed images, and the share of the unrolled images, a 0-d tensor."""
    inside, top, bottom, left, right = draw.unbind()
    rows = torch.arange(images.shape[2], device=images.device).view(-1, 1)
    columns = torch.arange(images.shape[3], device=images.device)
    box = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    weight = torch.where(box, inside, 1.0)
    return images * weight + images.roll(1, 0) * (1.0 - weight), weight.mean()
