import math
from types import SimpleNamespace

import pytest
import torch

from fastvitc.training import meter
from fastvitc.training.meter import Meter
from fastvitc.training.process import Process

ALONE = Process(0, 1, torch.device("cpu"))


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but where a test moves its `now`."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(meter, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def test_the_loss_is_the_mean_over_all_steps_even_those_before_a_restart(clock):
    measured = Meter(8, ALONE)
    measured.add(torch.tensor(1.0))
    measured.restart()
    for loss in (2.0, 6.0):
        measured.add(torch.tensor(loss))
    assert measured.mean_loss() == 3.0


def test_no_step_has_no_mean_loss(clock):
    assert math.isnan(Meter(8, ALONE).mean_loss())


def test_rates_count_the_time_since_the_restart(clock):
    measured = Meter(8, ALONE)
    clock.now += 50
    measured.add(torch.tensor(1.0))
    assert measured.restart() == 50
    for _ in range(3):
        with measured.waiting():
            clock.now += 1
        clock.now += 3
        measured.add(torch.tensor(1.0))
    assert measured.rates() == (3 * 8 / 12, 3 / 12)


def test_rates_before_any_time_has_passed_are_finite(clock):
    assert all(math.isfinite(rate) for rate in Meter(8, ALONE).rates())
