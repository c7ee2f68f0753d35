"""Whether a run is to be compiled: what that saves over its steps against what it takes at the start."""

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fastvitc.files import cache_folder, private_folder
from fastvitc.training.meter import duration

#: By device: the share of an eager step that compilation saves, and the seconds it takes for images of one size. CPU:
#: measured, see bench/LOG.md. CUDA: an estimate, not measured.
_SAVED = {"cpu": 0.05, "cuda": 0.25}
_SECONDS = {"cpu": 20.0, "cuda": 60.0}
#: The share of those seconds that it takes where an equal run was compiled before, from what torch.compile has kept.
#: Measured on a CPU, see bench/LOG.md.
_AGAIN = 0.15
_FOLDER = "TORCHINDUCTOR_CACHE_DIR"


@dataclass(frozen=True)
class Compilation:
    """The choice, and why; `mark` is a file that is there after an equal run was compiled."""

    compile: bool
    why: str
    mark: Path | None = None

    def remember(self) -> None:
        """Note that this run is compiled, where that can be noted."""
        if self.compile and self.mark is not None:
            with suppress(OSError):
                self.mark.touch()


def mark_of(*what: object) -> Path | None:
    """The mark of runs whose code is alike in `what`, beside what torch.compile keeps; None where it can keep nothing.

    That is `$TORCHINDUCTOR_CACHE_DIR`, and from here on by default a folder in the cache: temporary files go sooner.
    """
    if _FOLDER not in os.environ:
        try:
            os.environ[_FOLDER] = str(private_folder(cache_folder() / "inductor"))
        except OSError:
            return None
    name = hashlib.sha256(repr((torch.__version__, *what)).encode()).hexdigest()
    return Path(os.environ[_FOLDER], f"fastvitc-{name[:32]}")


def where_it_pays(device: torch.device, eager: float, sizes: int, mark: Path | None = None) -> Compilation:
    """The choice by what is to be expected.

    Args:
        device: what computes.
        eager: seconds of all steps of the run without compilation.
        sizes: different image sizes, or numbers of patches, that the run meets.
        mark: of this run.
    """
    saved, cost = _SAVED.get(device.type, 0.0) * eager, _SECONDS.get(device.type, 0.0) * sizes
    again = mark is not None and mark.exists()
    cost *= _AGAIN if again else 1.0
    pays = saved > cost
    before = ", as an equal run was compiled before" if again else ""
    why = (
        f"the steps take about {duration(eager)} without; compiled they would take about {duration(saved)} less, "
        f"and compiling takes about {duration(cost)}{before}. --{'no-' if pays else ''}compile chooses otherwise"
    )
    return Compilation(pays, why, mark)


def seconds_of_a_pass(objective: nn.Module, batch: tuple[Tensor, Tensor, Tensor | None]) -> float:
    """Seconds of an eager forward and backward pass, the fastest of some after one that is not timed.

    Weights, gradients, statistics and random states are afterwards as before.
    """
    images = batch[0]
    times = []
    with unchanged(objective, images.device):
        begun = time.perf_counter()
        while len(times) < 2 or (time.perf_counter() - begun < 1.0 and len(times) < 6):
            start = time.perf_counter()
            objective(*batch).backward()
            if images.is_cuda:
                torch.cuda.synchronize(images.device)
            times.append(time.perf_counter() - start)
    return min(times[1:])


@contextmanager
def unchanged(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Passes in here leave no gradients, and buffers and random states as they were."""
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    module.zero_grad(set_to_none=True)
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
