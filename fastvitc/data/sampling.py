"""Which samples each rank sees in which order: a pure function of seed, epoch, rank and world size."""

import numpy as np


def batches_per_epoch(
    n: int, batch_size: int, *, training: bool, rank: int = 0, world_size: int = 1
) -> tuple[int, int]:
    """(batches, samples) of one rank in one epoch over `n` samples, as `epoch_batches` deals them."""
    if training:
        batches = n // (batch_size * world_size)
        return batches, batches * batch_size
    samples = len(range(rank, n, world_size))
    return -(-samples // batch_size), samples


def epoch_batches(
    n: int,
    batch_size: int,
    *,
    training: bool,
    seed: int = 0,
    epoch: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> list[np.ndarray]:
    """The sample numbers of each batch, int64 of shape (batch_size,), of one rank in one epoch.

    Training: a permutation of `range(n)` drawn from (seed, epoch), dealt out to the ranks in turn; every rank gets
    as many full batches, what is left over is dropped. Evaluation: `range(n)` dealt out in turn, so that all
    ranks together see each sample once; the last batch may be shorter.
    """
    order = np.random.default_rng((seed, epoch)).permutation(n) if training else np.arange(n)
    batches, samples = batches_per_epoch(n, batch_size, training=training, rank=rank, world_size=world_size)
    mine = order[rank::world_size][:samples]
    return [mine[i * batch_size : (i + 1) * batch_size] for i in range(batches)]
