"""Stems: from an image to the encoder's token tensor. Usable as the first layer of any vision transformer."""

from fastvitc.models.stems.base import IMAGENET_MEAN, IMAGENET_STD
from fastvitc.models.stems.conv import ConvStem, PatchifyStem, StemConfig

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "ConvStem", "PatchifyStem", "StemConfig"]
