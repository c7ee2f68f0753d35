"""What changes while a run goes on: the learning rate, the size of the training images, the patches left out."""

from dataclasses import dataclass, replace
from math import cos, pi, prod, sqrt
from typing import Literal

SchedName = Literal["cosine", "wsd"]


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a share of the highest: a fall from 1 to `end_factor`, times a linear warm-up from
    `warmup_factor`.

    Attributes:
        epochs: of the run, as planned at its begin.
        warmup_epochs: of the rise.
        warmup_factor: share at the start of the rise.
        end_factor: share at the end of the fall.
        sched: how it falls. "cosine": a half-cosine over the run (paper, section 4). "wsd" (warm-up, stable, decay):
            not until the last `decay_share` of the run, there as 1 - sqrt(progress) (Hägele et al. 2024, section 3).
        decay_share: share of the run in which "wsd" falls.
        cooldown_epochs: the run's last epochs, which have the lowest rate.
        changes: (epoch, epochs): from that epoch on the run was to have so many epochs. The rate goes on from where it
            was, and its fall ends with the run.
    """

    epochs: float
    warmup_epochs: float = 5.0
    warmup_factor: float = 0.1
    end_factor: float = 0.005
    sched: SchedName = "cosine"
    decay_share: float = 0.2
    cooldown_epochs: float = 0.0
    changes: tuple[tuple[float, float], ...] = ()

    def at(self, epoch: float) -> float:
        """The share at a (fractional) epoch."""
        share = self.end_factor + (1.0 - self.end_factor) * self._height(self.progress(epoch))
        if epoch < self.warmup_epochs:
            progress = epoch / self.warmup_epochs
            share *= self.warmup_factor + (1.0 - self.warmup_factor) * progress
        return share

    def to_last(self, epochs: float, now: float) -> "Schedule":
        """This schedule for a run that is at the epoch `now` and is to have so many epochs."""
        planned = self.changes[-1][1] if self.changes else self.epochs
        return self if epochs == planned else replace(self, changes=(*self.changes, (now, epochs)))

    def progress(self, epoch: float) -> float:
        """How far the run has come before its cool-down, from 0 to 1."""
        progress = 0.0
        plans = [(0.0, self.epochs), *self.changes]
        for (start, epochs), (until, _) in zip(plans, [*self.changes, (epoch, 0.0)], strict=True):
            here, end = min(until, epoch) - start, epochs - self.cooldown_epochs
            share = 1.0 if here >= end - start else max(here / (end - start), 0.0)
            progress += (1.0 - progress) * share
        return progress

    def _height(self, progress: float) -> float:
        if self.sched == "cosine":
            return 0.5 * (1.0 + cos(pi * progress))
        into = max(0.0, progress - (1.0 - self.decay_share)) / max(self.decay_share, 1e-9)
        return 1.0 - sqrt(min(into, 1.0))


@dataclass(frozen=True)
class Curriculum:
    """What a training image costs as the run goes on: its size, and the patches that the encoder sees.

    Attributes:
        size: (height, width) of the images at the end.
        low_res: (height, width) of the images before; None for `size` at once.
        low_res_until: share of the run until which the images have `low_res`.
        patch_drop: share of the patches that are left out after the stem.
        patch_drop_until: share of the run until which they are.
    """

    size: tuple[int, int]
    low_res: tuple[int, int] | None = None
    low_res_until: float = 0.0
    patch_drop: float = 0.0
    patch_drop_until: float = 1.0

    def size_at(self, progress: float) -> tuple[int, int]:
        """(height, width) of the images at a share of the run."""
        return self.low_res if self.low_res is not None and progress < self.low_res_until else self.size

    def patch_drop_at(self, progress: float) -> float:
        """Share of the patches left out at a share of the run."""
        return self.patch_drop if progress < self.patch_drop_until else 0.0

    def cost(self) -> float:
        """The mean cost of a training image over the run, as a share of one of full size with all patches."""
        if self.low_res is None:
            return 1.0
        return 1.0 - self.low_res_until * (1.0 - prod(self.low_res) / prod(self.size))

    def shapes(self) -> int:
        """Different shapes that the model meets in training."""
        at = {0.0, self.low_res_until, self.patch_drop_until} - {1.0}
        return len({(self.size_at(progress), self.patch_drop_at(progress)) for progress in at})
