"""Loaders whose labels tell which image came, and what they yield."""

import numpy as np
import torch

from fastvitc.data import ImageIndex, LoaderConfig, create_loader
from fastvitc.data.source import Files

READING = ["pil", "dali"]
ALL = [*READING, "synthetic"]


def index_of(paths, split="train"):
    files = Files("", list(map(str, paths)))
    return ImageIndex(split, "", ("all",), files, np.arange(len(paths)))


def load(kind, index, **options):
    """A loader whose labels are the places in the index, so that they tell which image came."""
    settings = {"training": True, "batch_size": 10, "image_size": (32, 48), "workers": 0}
    return create_loader(kind, LoaderConfig(index, device=torch.device("cpu"), **settings | options))


def pixels(loader):
    return torch.cat([batch.images for batch in loader]).int()


def order(loader):
    return torch.cat([torch.empty(0, dtype=torch.int64), *(batch.labels for batch in loader)]).tolist()
