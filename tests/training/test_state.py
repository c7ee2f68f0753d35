import os
import pickle
from dataclasses import replace

import pytest
import torch
from messages import one_line_of
from torch import nn

from fastvitc.training.state import STATE, RunState

STATE_OF_A_RUN = RunState(
    epoch=3,
    best=71.5,
    model={"weight": torch.arange(12.0).view(3, 4), "count": torch.tensor(7)},
    ema=None,
    optimizers=[{"state": {0: {"step": torch.tensor(2.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}],
    settings={"lr": 0.1, "image_size": [32, 48], "output": None},
    classes=["cat", "dog"],
    world_size=2,
    backends={"attention": "torch"},
)


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.fixture
def state(tmp_path):
    path = tmp_path / "run" / "last" / STATE
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
    assert [p.name for p in state.parent.iterdir()] == [STATE]


@pytest.mark.parametrize("levels", [0, 1, 2], ids=["file", "last", "run"])
def test_a_state_is_found_by_file_last_folder_and_run_folder(levels, state):
    path = (state, *state.parents)[levels]
    loaded = RunState.load(path)
    for part in ("model", "optimizers"):
        assert_equal(getattr(loaded, part), getattr(STATE_OF_A_RUN, part))
    plain = {"model": {}, "optimizers": []}
    assert replace(loaded, **plain) == replace(STATE_OF_A_RUN, **plain)


def test_the_last_state_of_a_run_goes_before_one_beside_it(state):
    replace(STATE_OF_A_RUN, epoch=1).save(state.parents[1] / STATE)
    assert RunState.load(state.parents[1]).epoch == 3


def test_nothing_to_resume_is_said(tmp_path):
    assert "nothing to resume" in one_line_of(RunState.load, tmp_path / "run")


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
