import json
import os
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

from fastvitc import create_model
from fastvitc.errors import CheckpointError
from fastvitc.files import write_atomically
from fastvitc.models.saved import CONFIG, WEIGHTS, load_model, load_weights, read_config, save_model
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


def random_model(name="vitc_nano", **options):
    model = create_model(name, num_classes=3, **options)
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = torch.rand_like(tensor) if tensor.is_floating_point() else tensor + 5
    return model


@pytest.fixture
def saved(tmp_path):
    save_model(tmp_path / "model", random_model())
    return tmp_path / "model"


@pytest.fixture
def state(tmp_path):
    path = tmp_path / "run" / "last" / STATE
    STATE_OF_A_RUN.save(path)
    return path


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vitc_nano", {}),
        ("vitp_nano", {}),
        ("vitc_nano", {"image_size": (16, 64), "drop_path": 0.1, "in_chans": 1}),
        ("vitc_nano", {"pool": "mean"}),
    ],
)
def test_a_model_comes_back_bit_for_bit(name, options, tmp_path):
    model = random_model(name, **options)
    save_model(tmp_path, model)
    loaded = load_model(tmp_path)
    assert loaded.config == model.config
    assert_equal(loaded.state_dict(), model.state_dict())
    assert not loaded.training


def test_a_channels_last_model_comes_back_bit_for_bit(tmp_path):
    model = random_model().to(memory_format=torch.channels_last)
    save_model(tmp_path, model)
    assert_equal(load_model(tmp_path).state_dict(), model.state_dict())


def test_the_weights_file_may_be_named_instead_of_its_folder(saved):
    assert_equal(load_model(saved / WEIGHTS).state_dict(), load_model(str(saved)).state_dict())


def test_the_configuration_is_json_with_the_notes(tmp_path):
    save_model(tmp_path, random_model(), classes=["cat", "dög"], epoch=4)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config == read_config(tmp_path)
    assert (config["classes"], config["epoch"]) == (["cat", "dög"], 4)
    assert config["model"]["stem"]["channels"] == [24, 48, 96, 96]


def fail_while_writing(path):
    path.write_bytes(b"half of the new")
    raise OSError("no space left on device")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(OSError, match="no space left"):
        write_atomically(tmp_path / "file", fail_while_writing)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"old")]


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


def test_a_folder_that_a_failing_write_made_holds_no_temporary_file(tmp_path):
    with pytest.raises(OSError, match="no space left"):
        write_atomically(tmp_path / "new" / "file", fail_while_writing)
    assert not list((tmp_path / "new").iterdir())


def test_written_files_follow_the_umask(saved):
    umask = os.umask(0)
    os.umask(umask)
    assert {p.stat().st_mode & 0o777 for p in saved.iterdir()} == {0o666 & ~umask}


def one_line_of(call, *args):
    with pytest.raises(CheckpointError) as raised:
        call(*args)
    message = str(raised.value)
    assert message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
def test_damaged_weights_are_refused(keep, saved):
    (saved / WEIGHTS).write_bytes((saved / WEIGHTS).read_bytes()[:keep])
    assert "does not hold a whole saved model" in one_line_of(load_model, saved)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_missing_file_is_named(name, saved):
    (saved / name).unlink()
    assert name in one_line_of(load_model, saved)


@pytest.mark.parametrize(
    "config",
    [
        "{",
        "[]",
        "\x00\xff",
        '{"architectures": ["ViTModel"]}',
        '{"model": null}',
        '{"model": "vit"}',
        '{"model": {}}',
        '{"model": {"stem": "conv"}}',
        '{"model": {"stem": {"channels": 3}}}',
    ],
)
def test_a_foreign_configuration_is_refused(config, saved):
    (saved / CONFIG).write_text(config)
    assert str(saved) in one_line_of(load_model, saved)


@pytest.mark.parametrize(
    ("entry", "value", "words"),
    [
        ("heads", 5, "heads must divide width"),
        ("heads", 0, "does not hold a whole saved model"),
        ("image_size", [30, 32], "multiples of the stem's stride"),
        ("image_size", [32], "does not hold a whole saved model"),
        ("colour", "blue", "colour"),
        ("depth", 4, "Unexpected key"),
        ("depth", 6, "Missing key"),
        ("num_classes", 10, "size mismatch for head.weight"),
        ("mlp_width", -288, "does not hold a whole saved model"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(entry, value, words, saved):
    config = read_config(saved)
    config["model"][entry] = value
    (saved / CONFIG).write_text(json.dumps(config))
    assert words in one_line_of(load_model, saved)


def test_weights_of_another_model_are_refused_in_a_line_of_bearable_length():
    weights = random_model("vitp_nano").state_dict()
    message = one_line_of(load_weights, create_model("vitc_nano"), weights)
    assert "these weights do not fit the model" in message
    assert len(message) < 700


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
