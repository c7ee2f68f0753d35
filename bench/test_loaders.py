"""The data loaders on photographs of ImageNet's usual size, one thread each, timed in CPU seconds."""

import atexit
import shutil
import tempfile
import time
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision import datasets, transforms

from bench.contest import Candidate, Contest
from fastvitc.data import Augment, create_loader, index_split

IMAGES, SIZE = 64, 224


@cache
def photographs() -> Path:
    """A folder of 500x375 JPEGs, cut from the two photographs that scikit-learn ships."""
    root = Path(tempfile.mkdtemp(prefix="fastvitc-bench-"))
    atexit.register(shutil.rmtree, root)
    for number in range(IMAGES):
        photo = Image.fromarray(load_sample_images().images[number % 2])
        left, top = number % 8 * 12, number // 8 * 6
        folder = root / f"class{number % 2}"
        folder.mkdir(exist_ok=True)
        photo.crop((left, top, left + 500, top + 375)).save(folder / f"{number:03d}.jpg", quality=90)
    return root


def _ours(kind, training):
    return create_loader(
        kind,
        index_split(photographs(), "train" if training else "val"),
        training=training,
        batch_size=16,
        image_size=(SIZE, SIZE),
        augment=Augment(),
        device="cpu",
        workers=1 if kind == "dali" else 0,
    )


def _torchvision(training):
    if training:
        geometry = [transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip()]
    else:
        geometry = [transforms.Resize(256), transforms.CenterCrop(SIZE)]
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    transform = transforms.Compose([*geometry, transforms.ToTensor(), transforms.Normalize(mean, std)])
    return torch.utils.data.DataLoader(datasets.ImageFolder(photographs(), transform), 16, shuffle=training)


def _candidate(build):
    loader = build()

    def epoch():
        return sum(len(labels) for _, labels in loader)

    return Candidate(run=epoch, tensors=lambda: [torch.tensor([epoch()])])


def contests(scale, device, dtype):
    return [
        Contest(
            f"{'training' if training else 'validation'} loader, {SIZE} pixels, CPU seconds",
            truth=lambda: [torch.tensor([IMAGES])],
            contenders={
                f"fastvitc {kind}": partial(_candidate, partial(_ours, kind, training))
                for kind in ("pil", "dali")
            }
            | {"torchvision ImageFolder": partial(_candidate, partial(_torchvision, training))},
            images=IMAGES,
            tolerance=0.0,
        )
        for training in (True, False)
    ]


@pytest.mark.benchmark(timer=time.process_time)
def test_loader(entry, timed):
    timed(entry)
