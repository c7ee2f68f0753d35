"""What is measured on a GPU, most valuable first."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

import torch

from bench import test_models, test_ops
from bench.contest import Contest
from fastvitc.models.config import ViTConfig, preset

OPS = ("stem", "attention", "bn_relu")

#: Part → its two contests: forward, then forward + backward; of a model, training step, then inference.
_CONTESTS = {
    "stem": test_ops.stem_contests,
    "attention": test_ops.attention_contests,
    "bn_relu": test_ops.bn_relu_contests,
    "model": test_models.model_contests,
}
#: Part → contenders, most telling first: the last are left out first when time is short. Where the whole call is one of
#: our opaque ops there is nothing to compile, so it is timed once.
CONTENDERS = {
    "stem": (
        "fastvitc triton",
        "timm compiled",
        "timm",
        "fastvitc bn_relu",
        "fastvitc torch",
        "fastvitc torch compiled",
        "torchvision",
        "torchvision compiled",
    ),
    "attention": (
        "fastvitc triton",
        "scaled_dot_product_attention",
        "fastvitc cudnn",
        "fastvitc flash",
        "scaled_dot_product_attention compiled",
        "fastvitc efficient",
        "fastvitc xformers",
        "fastvitc torch",
    ),
    "bn_relu": ("fastvitc triton", "batch_norm, relu", "batch_norm, relu compiled", "fastvitc torch"),
    "model": (
        "fastvitc triton compiled",
        "timm compiled",
        "timm",
        "torchvision",
        "fastvitc triton",
        "fastvitc compiled",
        "torchvision compiled",
        "fastvitc",
    ),
}
#: Images of a call, before a lack of memory halves them.
_BATCH = {"vitc_1gf": 256, "vitc_4gf": 128, "vitc_18gf": 64, "vitc_36gf": 64}


_TINY = "vitc_nano of 1 block and 16 pixels"


def _config(model: str) -> ViTConfig:
    if model == _TINY:
        return replace(preset("vitc_nano"), depth=1, image_size=(16, 16), num_classes=10)
    return preset(model)


@dataclass(frozen=True)
class Entry:
    """One contest: a part of a model at a batch size; `backward` is the training step of the part "model"."""

    part: str
    model: str
    backward: bool
    batch: int

    @property
    def title(self) -> str:
        if self.part == "model":
            what = "training step" if self.backward else "inference"
            return f"{what}, {self.model}"
        return f"{self.part}, {self.model}, forward{' + backward' * self.backward}"

    @property
    def share(self) -> float:
        """Of the run's whole time, what it may take."""
        if self.part == "model":
            return 0.2 if self.backward else 0.1
        if self.part == "stem":  # some twenty kernels to compile
            return 0.12 if self.backward else 0.06
        return 0.05

    def contest(self, batch: int, device: torch.device, dtype: torch.dtype) -> Contest:
        """The contest at a batch size."""
        made = _CONTESTS[self.part](self.model, _config(self.model), batch, device, dtype)
        place = not self.backward if self.part == "model" else self.backward
        return next(islice(made, int(place), None))


def _entries(
    parts: Iterable[str], models: Iterable[str], backward: bool, batch: int | None
) -> Iterator[Entry]:
    parts = tuple(parts)
    for model in models:
        for part in parts:
            yield Entry(part, model, backward, batch or _BATCH[model])


def plan(dry_run: bool) -> list[Entry]:
    """The entries in their order; those of a dry run are tiny."""
    stages = [[_TINY]] if dry_run else [["vitc_1gf", "vitc_4gf"], ["vitc_18gf"], ["vitc_36gf"]]
    batch = 2 if dry_run else None
    return [
        entry
        for models in stages
        for backward in (True, False)
        for parts in (OPS, ["model"])
        for entry in _entries(parts, models, backward, batch)
    ]
