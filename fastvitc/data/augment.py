"""What happens to an image between its file and the batch: the geometry and the draws that all loaders share.

Training: a random window of the image, resized to the batch's size (bilinear, antialiased), a horizontal flip, a
policy of colour and warp operations. Each image's draws are a function of (seed, epoch, sample number) alone: not of
the loader, its workers, the batch size, or how many epochs ran before.

Evaluation: the image is scaled until it covers round(H / crop_ratio) x round(W / crop_ratio), to 256 x 256 or more
for 224 pixels and 0.875, and its H x W centre is kept.
"""

import math
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np

from fastvitc.data.policy import POLICIES, PolicyDraw, PolicyName, PolicySampler
from fastvitc.errors import UsageError
from fastvitc.ranges import Ascending, above, check_ranges, share

ATTEMPTS = 10  # windows tried before the largest one in the middle is taken
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Augment:
    """Augmentation of the training images.

    scale: least and largest share of the image's area in a window, each share equally likely.
    ratio: least and largest width / height of a window, uniform in its logarithm.
    hflip: chance of a horizontal flip.
    color_jitter: by what share brightness, contrast and colour change at most.
    policy: what follows on the uint8 pixels, see `fastvitc.data.policy`.

    Raises:
        UsageError: a value out of range.
    """

    scale: Annotated[tuple[float, float], share(zero=False), Ascending()] = (0.08, 1.0)
    ratio: Annotated[tuple[float, float], above(0), Ascending()] = (3 / 4, 4 / 3)
    hflip: Annotated[float, share()] = 0.5
    policy: PolicyName = "none"
    color_jitter: Annotated[float, share()] = 0.0

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.policy not in POLICIES:
            raise UsageError(f"there is no policy {self.policy!r}; choose among {', '.join(POLICIES)}")


class Draws(NamedTuple):
    """The random part of n training images.

    windows: float64 (n, ATTEMPTS, 2): height and width of the windows to try, over sqrt(image area).
    positions: float64 (n, 2): top and left of the window, as shares of the room it has.
    flips: int32 (n,), 1 to flip.
    policy: what the policy does.
    """

    windows: np.ndarray
    positions: np.ndarray
    flips: np.ndarray
    policy: PolicyDraw


class AugmentSampler:
    """Draws the random part of `augment` for images of one size, (height, width) in pixels."""

    def __init__(self, augment: Augment, image_size: tuple[int, int], seed: int) -> None:
        self._augment, self._seed = augment, seed
        self._policy = PolicySampler(augment.policy, image_size, augment.color_jitter)

    @property
    def stages(self) -> int:
        """Operations on the pixels after crop and flip."""
        return self._policy.stages

    def draw(self, epoch: int, samples: np.ndarray) -> Draws:
        """samples: int64 (n,), the numbers of the images in the data set."""
        a, n = self._augment, len(samples)
        u = _uniforms((self._seed, epoch), samples, 2 * ATTEMPTS + 3 + 3 * self._policy.stages)
        windows, positions, flips, policy = np.split(u, np.cumsum([2 * ATTEMPTS, 2, 1]), axis=1)
        area, aspect = windows.reshape(n, ATTEMPTS, 2).transpose(2, 0, 1)
        area = a.scale[0] + (a.scale[1] - a.scale[0]) * area
        aspect = a.ratio[0] * (a.ratio[1] / a.ratio[0]) ** aspect
        return Draws(
            np.stack([np.sqrt(area / aspect), np.sqrt(area * aspect)], axis=-1),
            positions,
            (flips[:, 0] < a.hflip).astype(np.int32),
            self._policy.draw(policy.reshape(n, self._policy.stages, 3)),
        )


def crop_window(
    size: tuple[int, int], windows: np.ndarray, position: np.ndarray, ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """(top, left, height, width) in pixels of the first window that fits an image of `size` (height, width).

    windows, position: one image's, see `Draws`. Where none fits, the largest window within `ratio`, in the middle.
    """
    image = np.array(size)
    tried = np.maximum(1, np.floor(np.sqrt(image.prod()) * windows + 0.5))
    fits = (tried <= image).all(axis=1)
    if fits.any():
        window = tried[fits.argmax()]
    else:
        window = np.minimum(image, np.floor(image[::-1] * (1 / ratio[0], ratio[1]) + 0.5))
        position = np.full(2, 0.5)
    corner = np.floor(position * (image - window + 1))
    top, left, height, width = np.concatenate([corner, window]).astype(int).tolist()
    return top, left, height, width


def centre_box(
    size: tuple[int, int], image_size: tuple[int, int], crop_ratio: float
) -> tuple[float, float, float, float]:
    """(top, left, bottom, right) in pixels of an image of `size` that, resized to `image_size`, is its evaluation crop.

    As torchvision's Resize, to whole pixels, and CenterCrop, whose corner is rounded to even, but in one step.
    """
    cover = covered_size(image_size, crop_ratio)
    scale = max(c / s for c, s in zip(cover, size, strict=True))
    resized = [max(c, math.floor(s * scale)) for c, s in zip(cover, size, strict=True)]
    corner = [round((r - out) / 2) for r, out in zip(resized, image_size, strict=True)]
    top, left = (c * s / r for c, s, r in zip(corner, size, resized, strict=True))
    bottom, right = (
        (c + out) * s / r for c, out, s, r in zip(corner, image_size, size, resized, strict=True)
    )
    return top, left, bottom, right


def covered_size(image_size: tuple[int, int], crop_ratio: float) -> tuple[int, int]:
    """(height, width) that the resized image covers at least in evaluation."""
    height, width = image_size
    return round(height / crop_ratio), round(width / crop_ratio)


def _uniforms(key: tuple[int, int], samples: np.ndarray, count: int) -> np.ndarray:
    """`count` numbers in [0, 1) per sample, float64 (n, count): SplitMix64 (Steele et al. 2014), entered anywhere."""
    start = np.random.SeedSequence(key).generate_state(1, np.uint64)
    place = samples.astype(np.uint64)[:, None] * np.uint64(count) + np.arange(1, count + 1, dtype=np.uint64)
    z = start + place * np.uint64(_GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)) * 2.0**-53
