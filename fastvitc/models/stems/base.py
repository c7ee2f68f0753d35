"""What every stem shares: how it takes its pixels."""

import torch
from torch import Tensor, nn

from fastvitc.kernels import Pixels

#: Channel means and standard deviations of ImageNet in units of a pixel value from 0 to 1.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageStem(nn.Module):
    """A module that reads images: uint8 ones of three channels are normalised with ImageNet's means and deviations.

    Args:
        in_chans: channels of the image.
    """

    def __init__(self, in_chans: int) -> None:
        super().__init__()
        self._frozen = False
        if in_chans == len(IMAGENET_MEAN):
            mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
            self.register_buffer("pixel_scale", 1 / (255 * std), persistent=False)
            self.register_buffer("pixel_shift", -mean / std, persistent=False)

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
