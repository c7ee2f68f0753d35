"""What every stem shares: how it takes its pixels."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastvitc.errors import UsageError
from fastvitc.kernels import Pixels

#: Channel means and standard deviations of ImageNet in units of a pixel value from 0 to 1.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pixel_statistics(
    in_chans: int, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """(means, deviations) of the channels, in units of a pixel value from 0 to 1; None where there are no defaults.

    The defaults are ImageNet's for three channels and their averages for one.

    Raises:
        UsageError: not a number for each channel, or a deviation that is not above 0.
    """
    default_mean, default_std = IMAGENET_MEAN, IMAGENET_STD
    if in_chans == 1:
        default_mean, default_std = (sum(IMAGENET_MEAN) / 3,), (sum(IMAGENET_STD) / 3,)
    if in_chans not in (1, 3) and mean is None and std is None:
        return None
    found = tuple(default_mean if mean is None else mean), tuple(default_std if std is None else std)
    if {len(values) for values in found} != {in_chans} or min(found[1]) <= 0:
        raise UsageError(
            f"mean and std must be a number for each of the {in_chans} channels, and std above 0; "
            f"got mean {mean} and std {std}"
        )
    return found


class ImageStem(nn.Module):
    """A module that reads images; it normalises uint8 ones itself, see `pixel_statistics`.

    Args:
        in_chans: channels of the image.
    """

    def __init__(self, in_chans: int) -> None:
        super().__init__()
        self._frozen = False
        statistics = pixel_statistics(in_chans)
        if statistics is not None:
            self.normalise_by(*statistics)

    def normalise_by(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Take other means and deviations for uint8 images, see `pixel_statistics`."""
        means, deviations = torch.tensor(mean), torch.tensor(std)
        self.register_buffer("pixel_scale", 1 / (255 * deviations), persistent=False)
        self.register_buffer("pixel_shift", -means / deviations, persistent=False)

    def freeze(self) -> None:
        """Hold the weights and the norms' statistics still from now on, whatever `train` says."""
        self._frozen = True
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "ImageStem":
        return super().train(mode and not self._frozen)

    def pixels(self, image: Tensor, mix: Tensor | None) -> Pixels:
        """How `image` becomes the first layer's input: a uint8 one is (image/255 − mean)/std; `mix` (5,) or None."""
        if image.dtype != torch.uint8:
            return Pixels(mix=mix)
        return Pixels(getattr(self, "pixel_scale", None), getattr(self, "pixel_shift", None), mix)
