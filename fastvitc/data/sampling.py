"""Which samples each rank sees in which order: a pure function of seed, epoch, rank and world size."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Samples(NamedTuple):
    """The sample numbers of a batch, int64 (batch_size,).

    In training `spares` are those of the next batch: a sample that cannot be read is replaced by the spare in its
    place, or by the next one that can. In evaluation there are none: such a sample counts as not seen.
    """

    numbers: np.ndarray
    spares: np.ndarray

    def candidates(self, place: int) -> list[int]:
        """The sample in a place, and what may replace it, in order."""
        spares = np.roll(self.spares, -place)
        return [int(self.numbers[place]), *map(int, spares)]


@dataclass(frozen=True)
class Order:
    """How one rank goes through `n` samples.

    Training: a permutation of `range(n)` drawn from (seed, epoch) is dealt out to the ranks in turn. Every rank gets
    as many full batches; what is left over is dropped. Evaluation: `range(n)` is dealt out in turn, so that all ranks
    together see each sample once; the last batch may be shorter.
    """

    n: int
    batch_size: int
    training: bool
    seed: int = 0
    rank: int = 0
    world_size: int = 1

    @property
    def batches(self) -> int:
        """Batches of an epoch."""
        if self.training:
            return self.n // (self.batch_size * self.world_size)
        return -(-self.samples // self.batch_size)

    @property
    def samples(self) -> int:
        """Samples of an epoch."""
        if self.training:
            return self.batches * self.batch_size
        return len(range(self.rank, self.n, self.world_size))

    def epoch(self, epoch: int, first: int = 0) -> list["Samples"]:
        """The samples of each batch of an epoch from batch number `first` on."""
        if self.training:
            order = np.random.default_rng((self.seed, epoch)).permutation(self.n)
        else:
            order = np.arange(self.n)
        mine = order[self.rank :: self.world_size][: self.samples]
        size = self.batch_size
        batches = [mine[i * size : (i + 1) * size] for i in range(self.batches)]
        following = [*batches[1:], *batches[:1]] if self.training else [mine[:0]] * self.batches
        return list(map(Samples, batches, following))[first:]
