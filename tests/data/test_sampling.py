import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastvitc.data.sampling import batches_per_epoch, epoch_batches

shapes = {"n": st.integers(0, 200), "batch_size": st.integers(1, 17), "world_size": st.integers(1, 5)}


def all_ranks(n, batch_size, world_size, **options):
    return [
        epoch_batches(n, batch_size, rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]


@given(**shapes)
def test_evaluation_sees_every_sample_exactly_once(n, batch_size, world_size):
    ranks = all_ranks(n, batch_size, world_size, training=False)
    seen = np.concatenate([np.empty(0, int), *(batch for rank in ranks for batch in rank)])
    assert sorted(seen.tolist()) == list(range(n))


@given(**shapes, epoch=st.integers(0, 3))
def test_training_gives_each_rank_as_many_full_batches_of_distinct_samples(n, batch_size, world_size, epoch):
    ranks = all_ranks(n, batch_size, world_size, training=True, epoch=epoch)
    assert {len(rank) for rank in ranks} == {n // (batch_size * world_size)}
    assert all(len(batch) == batch_size for rank in ranks for batch in rank)
    seen = [sample for rank in ranks for batch in rank for sample in batch.tolist()]
    assert len(set(seen)) == len(seen)
    assert set(seen) <= set(range(n))


@given(**shapes, training=st.booleans())
def test_the_counts_are_those_of_the_batches(n, batch_size, world_size, training):
    for rank, batches in enumerate(all_ranks(n, batch_size, world_size, training=training)):
        counts = batches_per_epoch(n, batch_size, training=training, rank=rank, world_size=world_size)
        assert counts == (len(batches), sum(map(len, batches)))


@pytest.mark.parametrize("change", [{"seed": 1}, {"epoch": 1}])
def test_seed_and_epoch_change_the_training_order(change):
    first, second = (epoch_batches(100, 10, training=True, **options) for options in ({}, change))
    assert np.concatenate(first).tolist() != np.concatenate(second).tolist()


def test_the_training_order_is_the_same_on_each_call():
    first, second = (epoch_batches(100, 10, training=True, seed=3, epoch=4) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_all_samples_are_as_likely_to_be_dropped():
    dropped = np.zeros(11)
    for epoch in range(2000):
        dropped[
            list(set(range(11)) - set(epoch_batches(11, 10, training=True, epoch=epoch)[0].tolist()))
        ] += 1
    assert abs(dropped - 2000 / 11).max() < 5 * np.sqrt(2000 / 11)
