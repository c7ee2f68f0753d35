import argparse

import pytest
import torch
from converting import CONV, PATCHIFY, ROUTES, assert_same, model_of, state_of
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from fastvitc import CheckpointError, UsageError
from fastvitc import convert as cv


def test_pycls_files_hold_weights_and_their_average(tmp_path):
    state, average = (dict(model_of(CONV, seed).state_dict()) for seed in (1, 2))
    content = {
        "epoch": 3,
        "test_err": 24.7,
        "ema_err": 24.1,
        "model_state": cv.to_pycls(state),
        "ema_state": cv.to_pycls(average),
        "optimizer_state": {"state": {}, "param_groups": []},
        "cfg": "MODEL:\n  TYPE: vit\n",
    }
    path = tmp_path / "model.pyth"
    torch.save(content, path)
    assert_same(cv.load(path, "pycls"), state)
    assert_same(cv.load(str(path), "pycls", ema=True), average)


@pytest.mark.parametrize("source", ["pycls", "torchvision", "timm"])
@pytest.mark.parametrize("entry", [None, "model", "state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_bare_and_nested_state_dicts_are_found_and_prefixes_dropped(tmp_path, source, entry, prefix):
    state = state_of(PATCHIFY)
    theirs = {prefix + key: tensor for key, tensor in getattr(cv, f"to_{source}")(state).items()}
    path = tmp_path / "checkpoint.pth"
    torch.save({"epoch": 1, entry: theirs} if entry else theirs, path)
    assert_same(cv.load(path, source), state)


@pytest.mark.parametrize("route", ROUTES)
def test_safetensors_files_are_read(tmp_path, route):
    state = state_of(CONV)
    path = tmp_path / "model.safetensors"
    save_file(ROUTES[route][0](state), path)
    assert_same(cv.load(path, route.split()[0]), state)


def test_files_with_the_arguments_of_a_training_script_are_read(tmp_path):
    state = state_of(CONV)
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": cv.to_torchvision(state), "args": argparse.Namespace(lr=0.1)}, path)
    assert_same(cv.load(path, "torchvision"), state)


def load_refusal(path, source="timm", **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        cv.load(path, source, **options)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kept", [0, 1, 7, 8, 100, 0.5, 0.99])
def test_truncated_files_are_refused(tmp_path, suffix, kept):
    path = tmp_path / f"model{suffix}"
    theirs = cv.to_timm(state_of(CONV))
    save_file(theirs, path) if suffix == ".safetensors" else torch.save(theirs, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: kept if isinstance(kept, int) else int(kept * len(whole))])
    assert "cannot be read as a checkpoint" in load_refusal(path)


@settings(max_examples=60, deadline=None)
@given(content=st.binary(max_size=200), suffix=st.sampled_from([".pth", ".safetensors"]))
def test_foreign_bytes_are_refused(tmp_path_factory, content, suffix):
    path = tmp_path_factory.mktemp("foreign") / f"model{suffix}"
    path.write_bytes(content)
    load_refusal(path)


class Malicious:
    def __reduce__(self):
        return print, ("code in a checkpoint was run",)


def test_code_in_a_file_is_not_run(tmp_path, capsys):
    path = tmp_path / "model.pth"
    torch.save({"model": Malicious()}, path)
    assert "cannot be read as a checkpoint (UnpicklingError" in load_refusal(path)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_missing_files_and_folders_are_refused(tmp_path, suffix):
    assert "FileNotFoundError" in load_refusal(tmp_path / f"missing{suffix}")
    folder = tmp_path / f"folder{suffix}"
    folder.mkdir()
    assert "cannot be read as a checkpoint" in load_refusal(folder)


@pytest.mark.parametrize("content", [torch.zeros(3), [1, 2], "text"])
def test_files_without_a_state_dict_are_refused(tmp_path, content):
    path = tmp_path / "model.pth"
    torch.save(content, path)
    assert "expected a state dict" in load_refusal(path)


def test_entries_beside_the_weights_are_passed_over(tmp_path):
    state = state_of(CONV)
    path = tmp_path / "model.pth"
    torch.save({"model": "vit", "state_dict": cv.to_timm(state)}, path)
    assert_same(cv.load(path, "timm"), state)


def test_the_file_is_named_when_its_keys_do_not_fit(tmp_path):
    path = tmp_path / "model.pth"
    torch.save(cv.to_pycls(state_of(CONV)), path)
    assert "the keys look like those of pycls" in load_refusal(path, "timm")


@pytest.mark.parametrize("average", [{}, {"ema_state": None}], ids=["absent", "empty"])
def test_a_pycls_file_without_an_average_says_so(tmp_path, average):
    path = tmp_path / "model.pyth"
    torch.save({"model_state": cv.to_pycls(state_of(CONV)), **average}, path)
    assert "has no weights in ema_state; load it with ema=False" in load_refusal(path, "pycls", ema=True)


def test_an_unknown_source_is_refused(tmp_path):
    with pytest.raises(UsageError, match="pycls, torchvision, timm, got 'keras'"):
        cv.load(tmp_path / "model.pth", "keras")


def test_an_average_is_only_taken_from_pycls(tmp_path):
    with pytest.raises(UsageError, match="needs a pycls checkpoint"):
        cv.load(tmp_path / "model.pth", "timm", ema=True)


@pytest.mark.parametrize("write", [None, *ROUTES])
def test_the_names_in_a_file_tell_its_library(write, tmp_path):
    state = state_of(CONV)
    torch.save(state if write is None else ROUTES[write][0](state), tmp_path / "weights.pth")
    assert_same(cv.load(tmp_path / "weights.pth"), state)
