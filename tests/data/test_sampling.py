import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastvitc.data.sampling import Order

shapes = {"n": st.integers(0, 200), "batch_size": st.integers(1, 17), "world_size": st.integers(1, 5)}


def numbers(epoch):
    return [samples.numbers for samples in epoch]


def orders(n, batch_size, world_size, training):
    return [Order(n, batch_size, training, rank=rank, world_size=world_size) for rank in range(world_size)]


@given(**shapes)
def test_evaluation_sees_every_sample_exactly_once(n, batch_size, world_size):
    ranks = [numbers(order.epoch(0)) for order in orders(n, batch_size, world_size, training=False)]
    seen = np.concatenate([np.empty(0, int), *(batch for rank in ranks for batch in rank)])
    assert sorted(seen.tolist()) == list(range(n))


@given(**shapes, epoch=st.integers(0, 3))
def test_training_gives_each_rank_as_many_full_batches_of_distinct_samples(n, batch_size, world_size, epoch):
    ranks = [numbers(order.epoch(epoch)) for order in orders(n, batch_size, world_size, training=True)]
    assert {len(rank) for rank in ranks} == {n // (batch_size * world_size)}
    assert all(len(batch) == batch_size for rank in ranks for batch in rank)
    seen = [sample for rank in ranks for batch in rank for sample in batch.tolist()]
    assert len(set(seen)) == len(seen)
    assert set(seen) <= set(range(n))


@given(**shapes, training=st.booleans())
def test_the_counts_are_those_of_the_batches(n, batch_size, world_size, training):
    for order in orders(n, batch_size, world_size, training):
        batches = numbers(order.epoch(0))
        assert (order.batches, order.samples) == (len(batches), sum(map(len, batches)))


@given(**shapes, training=st.booleans(), first=st.integers(0, 30))
def test_an_epoch_goes_on_from_any_batch(n, batch_size, world_size, training, first):
    order = orders(n, batch_size, world_size, training)[0]
    whole, rest = numbers(order.epoch(2)), numbers(order.epoch(2, first))
    assert [batch.tolist() for batch in rest] == [batch.tolist() for batch in whole[first:]]


@pytest.mark.parametrize("change", [{"seed": 1}, {"epoch": 1}])
def test_seed_and_epoch_change_the_training_order(change):
    first = numbers(Order(100, 10, training=True).epoch(0))
    second = numbers(Order(100, 10, training=True, seed=change.get("seed", 0)).epoch(change.get("epoch", 0)))
    assert np.concatenate(first).tolist() != np.concatenate(second).tolist()


def test_the_training_order_is_the_same_on_each_call():
    first, second = (numbers(Order(100, 10, training=True, seed=3).epoch(4)) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_all_samples_are_as_likely_to_be_dropped():
    dropped, order = np.zeros(11), Order(11, 10, training=True)
    for epoch in range(2000):
        dropped[list(set(range(11)) - set(order.epoch(epoch)[0].numbers.tolist()))] += 1
    assert abs(dropped - 2000 / 11).max() < 5 * np.sqrt(2000 / 11)


def test_a_sample_may_be_replaced_by_any_of_the_next_batch_the_one_in_its_place_first():
    epoch = Order(9, 3, training=True).epoch(0)
    for batch, after in zip(epoch, [*epoch[1:], epoch[0]], strict=True):
        spares = after.numbers.tolist()
        assert list(batch.candidates(1)) == [batch.numbers[1], spares[1], spares[2], spares[0]]


def test_in_evaluation_nothing_replaces_a_sample():
    (batch,) = Order(3, 4, training=False).epoch(0)
    assert [list(batch.candidates(place)) for place in range(3)] == [[0], [1], [2]]
