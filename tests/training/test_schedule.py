import pytest

from fastvitc.training.schedule import Curriculum, Schedule


def test_wsd_stays_at_the_highest_rate_and_falls_in_its_share_of_the_run():
    wsd = Schedule(epochs=10, warmup_epochs=1, sched="wsd", decay_share=0.4, end_factor=0.1)
    assert [wsd.at(epoch) for epoch in (1, 3.5, 6)] == [1.0, 1.0, 1.0]
    assert wsd.at(7) == pytest.approx(0.1 + 0.9 * 0.5)  # a quarter of the fall: 1 - sqrt(1/4)
    assert wsd.at(10) == pytest.approx(0.1)
    assert wsd.at(0.5) == pytest.approx(0.55)


@pytest.mark.parametrize("sched", ["cosine", "wsd"])
def test_the_last_epochs_have_the_lowest_rate(sched):
    cooling = Schedule(epochs=10, warmup_epochs=0, sched=sched, cooldown_epochs=2)
    assert cooling.at(7.9) > cooling.at(8) == cooling.at(9.5) == pytest.approx(0.005)
    whole = Schedule(epochs=8, warmup_epochs=0, sched=sched)
    assert [cooling.at(epoch) for epoch in range(9)] == [whole.at(epoch) for epoch in range(9)]


def test_progress_goes_on_from_where_it_was_when_the_run_is_to_last_longer():
    longer = Schedule(epochs=10).to_last(20, now=5)
    assert [longer.progress(epoch) for epoch in (0, 5, 12.5, 20)] == [0, 0.5, 0.75, 1]


def test_a_curriculum_changes_at_its_shares_of_the_run():
    c = Curriculum((96, 96), low_res=(64, 64), low_res_until=0.6, patch_drop=0.5, patch_drop_until=0.3)
    assert [c.size_at(p) for p in (0, 0.59, 0.6, 1)] == [(64, 64), (64, 64), (96, 96), (96, 96)]
    assert [c.patch_drop_at(p) for p in (0, 0.29, 0.3)] == [0.5, 0.5, 0.0]
    assert Curriculum((96, 96)).size_at(0) == (96, 96)
