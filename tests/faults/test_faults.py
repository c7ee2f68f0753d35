"""A few trials of each row; `python -m tests.faults` makes them all."""

import pytest

from .place import Place
from .row import NotRun
from .saves import shim
from .table import ROWS


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Where the rows share the digits and undisturbed runs."""
    return tmp_path_factory.mktemp("faults")


@pytest.fixture
def holds(shared, tmp_path):
    """Makes some trials of a row."""
    place = Place(tmp_path, shared, warm=True, preload=shim(shared))

    def check(name, trials):
        try:
            outcome = ROWS[name].check(place, trials)
        except NotRun as reason:
            pytest.skip(str(reason))
        assert outcome.held, outcome.words
        assert outcome.trials >= 1

    return check


def test_a_run_that_is_killed_and_started_again_ends_as_the_undisturbed_one(holds):
    holds("sigkill", 4)


def test_a_kill_inside_a_save_leaves_the_old_state_or_the_new_one(holds):
    holds("save-kill", 3)


def test_a_run_that_is_cut_within_an_epoch_ends_as_the_undisturbed_one(holds):
    holds("bit-exact", 2)


def test_a_signal_ends_a_run_after_its_step_which_is_saved(holds):
    holds("signals", 1)


def test_a_second_interrupt_ends_a_run_at_once(holds):
    holds("second-interrupt", 1)


def test_where_one_of_two_processes_is_killed_the_other_ends(holds):
    holds("rank-crash", 1)


def test_images_that_cannot_be_read_are_replaced_counted_and_listed(holds):
    holds("corrupt", 1)


def test_every_state_of_a_run_whose_numbers_are_not_finite_is_finite(holds):
    holds("not-finite", 3)


def test_a_run_goes_on_after_a_full_disk(holds):
    holds("disk-full", 1)


def test_a_folder_that_cannot_be_written_to_ends_a_run_with_one_line(holds):
    holds("read-only", 2)


def test_a_damaged_state_is_never_loaded_as_another(holds):
    holds("damaged", 5)


def test_a_malicious_state_executes_nothing(holds):
    holds("malicious", 3)


def test_kernels_that_others_can_write_to_are_not_loaded(holds):
    holds("foreign-cache", 1)


def test_where_the_process_on_another_machine_is_killed_this_one_ends_with_one_line(holds):
    holds("lost-machine", 1)


def test_a_link_that_is_down_for_some_seconds_changes_nothing(holds):
    holds("link-down", 1)


@pytest.mark.full
def test_processes_that_torchrun_starts_again_end_as_the_undisturbed_run(holds):
    holds("restarted-ranks", 1)


@pytest.mark.full
def test_memory_does_not_grow_over_the_epochs(holds):
    holds("memory", 15)
