"""Training that begins with weights of this library, timm and torchvision."""

import json
import shutil

import pytest
import torch
from running import train
from safetensors.torch import save_file

from bench.peers import timm_model, torchvision_model
from fastvitc import convert as cv
from fastvitc import create_model, load_model
from fastvitc.programs import train as train_program
from fastvitc.training.report import read_summary
from fastvitc.training.state import newest_state


def stem_of(state):
    return {name: value for name, value in state.items() if name.startswith("stem.")}


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.fixture
def two_digits(few_digits, tmp_path):
    """The digits without the class 2."""
    data = shutil.copytree(few_digits, tmp_path / "data")
    for split in ("train", "val"):
        shutil.rmtree(data / split / "2")
    return data


def test_a_run_begins_with_a_saved_model_for_other_classes_and_another_size(finished, two_digits, tmp_path):
    begin = finished[0] / "best"
    options = ["--initial-checkpoint", begin, "--image-size", 40, "-o", tmp_path / "run", "--freeze-stem"]
    log = train(two_digits, *options)
    assert f"begins with the weights in {begin}, a new head" in log
    assert "recipe finetune" in log
    tuned = load_model(tmp_path / "run" / "last")
    assert (tuned.config.num_classes, tuned.config.image_size) == (2, (40, 40))
    assert_equal(stem_of(tuned.state_dict()), stem_of(load_model(begin).state_dict()))
    assert not torch.equal(tuned.blocks[0].mlp.fc1.weight, load_model(begin).blocks[0].mlp.fc1.weight)


def test_the_weights_of_a_run_teach_the_same_classes_sooner(few_digits, tmp_path):
    train(few_digits, "-o", tmp_path / "first", "--epochs", 12)
    again = ["--initial-checkpoint", tmp_path / "first" / "last", "--recipe", "small", "--epochs", 1]
    log = train(few_digits, "-o", tmp_path / "second", *again)
    assert "last, their head" in log
    first, second = (read_summary(tmp_path / name / "summary.csv")[0] for name in ("first", "second"))
    assert second.val_loss < first.val_loss - 0.1


@pytest.mark.parametrize(("build", "suffix"), [(timm_model, "safetensors"), (torchvision_model, "pth")])
def test_a_run_begins_with_a_file_of_another_library_and_goes_on_without_it(
    build, suffix, two_digits, tmp_path
):
    peer = build(create_model("vitc_nano", num_classes=7).config)
    file = tmp_path / f"weights.{suffix}"
    if suffix == "pth":
        torch.save({"model": peer.state_dict(), "epoch": 3}, file)
    else:
        save_file(peer.state_dict(), file)
    options = ["--initial-checkpoint", file, "-o", tmp_path / "run", "--layer-decay", 0.5, "--freeze-stem"]
    log = train(two_digits, *options, "--epochs", 1)
    assert f"begins with the weights in {file}, a new head" in log
    convert = cv.from_timm if build is timm_model else cv.from_torchvision
    expected = stem_of(convert(peer.state_dict()))
    assert_equal(stem_of(load_model(tmp_path / "run" / "last").state_dict()), expected)
    file.unlink()
    train_program.train(*train_program.read_settings(["--resume", str(tmp_path / "run"), "--epochs", "2"]))
    assert newest_state(tmp_path / "run")[1].epoch == 2


def test_a_file_of_another_library_needs_the_model(tmp_path, few_digits, ends):
    torch.save({}, tmp_path / "weights.pth")
    options = ["--data-dir", few_digits, "--initial-checkpoint", tmp_path / "weights.pth"]
    code, message = ends(train_program, *options)
    assert code == 2
    assert "does not name its model; give the preset with --model" in message


@pytest.mark.parametrize(("damage", "words"), [("other", "do not fit the model"), ("none", "cannot be read")])
def test_weights_that_do_not_fit_are_one_line(damage, words, tmp_path, few_digits, ends):
    file = tmp_path / "weights.pth"
    if damage == "other":
        torch.save(create_model("vitp_nano").state_dict(), file)
    options = ["--data-dir", few_digits, "--model", "vitc_nano", "--initial-checkpoint", file, "--no-compile"]
    code, message = ends(train_program, *options, "-o", tmp_path / "run")
    assert (code, words in message) == (1, True), message
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_saved_model_without_a_name_needs_the_model(finished, few_digits, tmp_path, ends):
    folder = shutil.copytree(finished[0] / "last", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    del config["name"]
    (folder / "config.json").write_text(json.dumps(config))
    code, message = ends(train_program, "--data-dir", few_digits, "--initial-checkpoint", folder)
    assert (code, "does not name its model" in message) == (2, True), message
