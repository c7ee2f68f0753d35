"""Which samples each rank sees in which order: a pure function of seed, epoch, rank and world size."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, overload

import numpy as np


class Samples(NamedTuple):
    """The sample numbers of a batch, int64 (batch_size,).

    In training `spares` are those of the next batch: a sample that cannot be read is replaced by the spare in its
    place, or by the next one that can. In evaluation there are none: such a sample counts as not seen.
    """

    numbers: np.ndarray
    spares: np.ndarray

    def candidates(self, place: int) -> Iterator[int]:
        """The sample in a place, and what may replace it, in order."""
        yield int(self.numbers[place])
        yield from map(int, np.roll(self.spares, -place))


@dataclass(frozen=True)
class Epoch(Sequence[Samples]):
    """Batches of an epoch; each is made when it is asked for.

    numbers: one rank's samples of the whole epoch. batches: which of its batches these are.
    """

    numbers: np.ndarray
    batch_size: int
    training: bool
    batches: range

    def __len__(self) -> int:
        return len(self.batches)

    @overload
    def __getitem__(self, place: int) -> Samples: ...
    @overload
    def __getitem__(self, place: slice) -> "Epoch": ...
    def __getitem__(self, place: int | slice) -> "Samples | Epoch":
        if isinstance(place, slice):
            return replace(self, batches=self.batches[place])
        start = self.batches[place] * self.batch_size
        after = (start + self.batch_size) % len(self.numbers) if self.training else len(self.numbers)
        return Samples(self._batch(start), self._batch(after))

    def _batch(self, start: int) -> np.ndarray:
        return self.numbers[start : start + self.batch_size].astype(np.int64)


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

    def epoch(self, epoch: int, first: int = 0) -> Epoch:
        """The samples of each batch of an epoch from batch number `first` on."""
        dtype = np.int32 if self.n < 2**31 else np.int64  # millions of samples on each of many ranks
        order = np.arange(self.n, dtype=dtype)
        if self.training:
            np.random.default_rng((self.seed, epoch)).shuffle(order)
        mine = order[self.rank :: self.world_size][: self.samples].copy()
        return Epoch(mine, self.batch_size, self.training, range(self.batches)[first:])
