"""The data loaders on photographs of ImageNet's usual size, one thread each, uint8 out, timed in CPU seconds."""

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
from fastvitc.data import Augment, LoaderConfig, create_loader, index_split

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
    config = LoaderConfig(
        index_split(photographs(), "train" if training else "val"),
        training=training,
        batch_size=16,
        image_size=(SIZE, SIZE),
        augment=Augment(),
        device=torch.device("cpu"),
        workers=1 if kind == "dali" else 0,
    )
    return create_loader(kind, config)


def _torchvision(training):
    if training:
        geometry = [transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip()]
    else:
        geometry = [transforms.Resize(256), transforms.CenterCrop(SIZE)]
    transform = transforms.Compose([*geometry, transforms.PILToTensor()])
    return torch.utils.data.DataLoader(datasets.ImageFolder(photographs(), transform), 16, shuffle=training)


def _candidate(build):
    loader = build()

    def epoch():
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # waiting threads would count as work
        try:
            return [(images.dtype, len(labels)) for images, labels in loader]
        finally:
            torch.set_num_threads(threads)

    def tensors():
        dtypes, counts = zip(*epoch(), strict=True)
        assert set(dtypes) == {torch.uint8}
        return [torch.tensor([sum(counts)])]

    return Candidate(run=epoch, tensors=tensors)


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
