"""Stems: from an image to the encoder's token tensor. Usable as the first layer of any vision transformer.

A stem's configuration builds its module and counts itself. To add a stem, write both in a module beside these, and name
the configuration in `STEMS`.
"""

from fastvitc.models.stems.base import IMAGENET_MEAN, IMAGENET_STD, pixel_statistics
from fastvitc.models.stems.conv import ConvStem, PatchifyStem, StemConfig

#: The name of a kind of stem in a saved model's config.json → its configuration.
STEMS = {"conv": StemConfig}

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "STEMS",
    "ConvStem",
    "PatchifyStem",
    "StemConfig",
    "pixel_statistics",
]
