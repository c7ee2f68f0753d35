"""One-block models, batches of noise and the steps on them."""

from dataclasses import replace

import torch
from torch import nn

from fastvitc import VisionTransformer
from fastvitc.models.config import preset
from fastvitc.models.stems import IMAGENET_MEAN, IMAGENET_STD
from fastvitc.training.evaluation import Evaluator
from fastvitc.training.process import Process
from fastvitc.training.step import TrainStep

HERE = Process(0, 1, torch.device("cpu"))
CLASSES = 7


def small(name, num_classes=CLASSES, drop_path=0.0, depth=1):
    """A model of few blocks whose head is not zero, the same at each call."""
    torch.manual_seed(1)
    config = replace(preset(name), depth=depth, num_classes=num_classes, drop_path=drop_path)
    model = VisionTransformer(config).to(memory_format=torch.channels_last)
    nn.init.normal_(model.head.weight, std=0.3)
    return model


def batch(count, classes=CLASSES):
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8)
    return images.contiguous(memory_format=torch.channels_last), torch.randint(classes, (count,))


def normal(images):
    """uint8 images as the model's stem normalises them."""
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (images / 255 - mean) / std


def triple(count):
    return *batch(count), None


def train_step(model, lr=0.1, **options):
    optimizers = [torch.optim.SGD(model.parameters(), lr=lr)]
    options = {"dtype": torch.float32, "compile": False, **options}
    return TrainStep(model, optimizers, HERE, **options)


def evaluator(model, batch_size, **options):
    return Evaluator(
        model, HERE, **{"dtype": torch.float32, "compile": False, **options}, batch_size=batch_size
    )


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}
