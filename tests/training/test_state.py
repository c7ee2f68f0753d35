import os
import pickle
from dataclasses import replace

import pytest
import torch
from messages import one_line_of
from torch import nn

from fastvitc.training.state import RunState, newest_state, on_host, state_files

STATE_OF_A_RUN = RunState(
    epoch=3,
    step=0,
    best=71.5,
    rows=[{"epoch": 1, "val_top1": 60.0}],
    model={"weight": torch.arange(12.0).view(3, 4), "count": torch.tensor(7)},
    ema=None,
    optimizers=[{"state": {0: {"step": torch.tensor(2.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}],
    settings={"lr": 0.1, "image_size": [32, 48], "output": None},
    processes=[{"statistics": [], "meter": {"loss": None, "losses": 0}}],
    classes=["cat", "dog"],
    backends={"attention": "torch"},
    data="digest",
    lengths=[[0.0, 5]],
    skipped=[],
    rollbacks=0,
)


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.fixture
def state(tmp_path):
    path = STATE_OF_A_RUN.file_in(tmp_path / "run")
    STATE_OF_A_RUN.save(path)
    return path


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_state_is_the_old_one_until_the_new_one_is_whole(failing, state, monkeypatch):
    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(*(os, "fsync", fail) if failing == "fsync" else ("pathlib.Path.replace", fail))
    with pytest.raises(OSError, match="no space left"):
        replace(STATE_OF_A_RUN, epoch=4).save(state)
    monkeypatch.undo()
    assert RunState.load(state).epoch == 3
    assert list(state.parent.iterdir()) == [state]


@pytest.mark.parametrize("levels", [0, 1, 2], ids=["file", "checkpoints", "run"])
def test_a_state_is_found_by_its_file_its_folder_and_the_runs_folder(levels, state):
    folder, loaded = newest_state((state, *state.parents)[levels])
    assert folder == state.parents[1]
    for part in ("model", "optimizers"):
        assert_equal(getattr(loaded, part), getattr(STATE_OF_A_RUN, part))
    plain = {"model": {}, "optimizers": []}
    assert replace(loaded, **plain) == replace(STATE_OF_A_RUN, **plain)


def test_the_newest_state_is_of_the_last_epoch_and_in_it_of_the_last_step(state):
    run = state.parents[1]
    for epoch, step in ((2, 900), (3, 7), (3, 12), (10, 0), (9, 1000)):
        other = replace(STATE_OF_A_RUN, epoch=epoch, step=step)
        other.save(other.file_in(run))
    assert newest_state(run)[1].epoch == 10
    state_files(run)[0].unlink()
    assert (newest_state(run)[1].epoch, newest_state(run)[1].step) == (9, 1000)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_damaged_state_is_passed_over_with_a_warning(damage, state):
    newer = replace(STATE_OF_A_RUN, epoch=4).file_in(state.parents[1])
    replace(STATE_OF_A_RUN, epoch=4).save(newer)
    content = bytearray(newer.read_bytes())
    if damage == "flipped":
        content[content.index(b"cat")] ^= 4
    newer.write_bytes(content[: {"truncated": len(content) // 2, "empty": 0}.get(damage, len(content))])
    warnings = []
    assert newest_state(state.parents[1], warnings.append)[1].epoch == 3
    assert len(warnings) == 1
    assert newer.name in warnings[0]
    assert state.name in warnings[0]


def test_where_every_state_is_damaged_each_is_named(state):
    state.write_bytes(b"")
    assert state.name in one_line_of(newest_state, state.parents[1])


def test_nothing_to_resume_is_said(tmp_path):
    assert "nothing to resume" in one_line_of(newest_state, tmp_path / "run")


def test_a_copy_on_the_host_keeps_its_values_when_the_original_moves_on():
    weight = torch.ones(2)
    copied = on_host({"a": [weight, (weight, 3)], "b": None})
    weight.add_(1)
    assert copied["a"][0].tolist() == copied["a"][1][0].tolist() == [1, 1]
    assert (copied["a"][1][1], copied["b"]) == (3, None)


@pytest.mark.parametrize("share", [0, 0.001, 0.02, 0.25, 0.5, 0.75, 0.95, 0.999])
def test_a_truncated_state_is_refused(share, state):
    whole = state.read_bytes()
    state.write_bytes(whole[: int(share * len(whole))])
    assert "cannot be read as a training state" in one_line_of(RunState.load, state)


@pytest.mark.parametrize(
    "content", [b"PK", b"<html>\n</html>", b"0", b"r", b"\x80\x02(.", b"\x80\x02\x8a", b"\x80\x02e."]
)
def test_a_file_of_another_kind_is_refused(content, state):
    state.write_bytes(content)
    assert str(state) in one_line_of(RunState.load, state)


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("write", [torch.save, pickle.dump])
def test_code_in_a_state_is_not_run(write, state, tmp_path):
    trace = tmp_path / "trace"
    with state.open("wb") as file:
        write({"format": Attack(str(trace))}, file)
    assert "cannot be read as a training state" in one_line_of(RunState.load, state)
    assert not trace.exists()


@pytest.mark.parametrize(
    "other", [{"epoch": 3}, {"format": "fastvitc training state, 0"}, [1, 2], nn.Linear(2, 1).state_dict()]
)
def test_a_state_of_another_format_is_refused(other, state):
    torch.save(other, state)
    assert "is not a training state of this version" in one_line_of(RunState.load, state)
