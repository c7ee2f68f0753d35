"""End to end: fastvitc-train on a small folder of real digits."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from running import SMALL, said, train, weights_hash

from fastvitc.models import config as presets
from fastvitc.models.saved import load_model
from fastvitc.programs import train as train_program
from fastvitc.training.report import read_summary
from fastvitc.training.state import newest_state


def test_a_run_leaves_weights_curves_summary_settings_and_state(finished):
    folder, _ = finished
    for name in ("last", "best"):
        assert {p.name for p in (folder / name).iterdir()} >= {"model.safetensors", "config.json"}
    config = json.loads((folder / "best" / "config.json").read_text())
    assert config["classes"] == ["0", "1", "2"]
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [row.epoch for row in read_summary(folder / "summary.csv")] == [1, 2]
    args = yaml.safe_load((folder / "args.yaml").read_text())
    assert args["batch_size"] == 16
    assert (
        args["backend"]
        == "add_layer_norm=native,attention=native,bias_gelu=native,bn_relu=native,conv_stem=native"
    )
    assert newest_state(folder)[1].epoch == 2
    assert list((folder / "tensorboard").iterdir())


def test_the_log_names_convention_peak_backends_and_rates(finished):
    _, log = finished
    for words in (
        "a multiply-add or bias add is one",
        "three times forward, a multiply-add is two",
        "attention native",
        "images/s",
    ):
        assert words in log
    assert "data wait" in log
    assert "compiled anew" not in log


def test_saved_weights_load_by_name_without_a_checkout_of_the_settings(finished):
    model = load_model(finished[0] / "best")
    assert model.config.num_classes == 3
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


def test_a_seed_fixes_the_weights(finished, few_digits, tmp_path):
    train(few_digits, "-o", tmp_path / "again")
    assert weights_hash(tmp_path / "again") == weights_hash(finished[0])
    train(few_digits, "-o", tmp_path / "other", "--seed", 1)
    assert weights_hash(tmp_path / "other") != weights_hash(finished[0])


@pytest.fixture(params=["one block of patches", pytest.param("whole", marks=pytest.mark.full)])
def nano(request, monkeypatch):
    """The nano model whole, or of one block and without its convolutions, which compiles sooner."""
    if request.param != "whole":
        monkeypatch.setitem(presets._PRESETS, "vitc_nano", replace(presets.preset("vitp_nano"), depth=1))


@pytest.mark.slow
@pytest.mark.usefixtures("nano")
def test_the_compiled_run_is_deterministic_and_compiles_nothing_after_its_first_epoch(few_digits, tmp_path):
    options = ["--compile", "--epochs", 3, "--mixup", 0.2, "--cutmix", 0.2, "--grad-accum-steps", 2]
    logs = []
    for name in ("one", "two"):
        torch.compiler.reset()
        logs.append(train(few_digits, "-o", tmp_path / name, *options))
    assert all("compiled anew" not in log for log in logs)
    assert all("first step, compilation included" in log for log in logs)
    assert weights_hash(tmp_path / "one") == weights_hash(tmp_path / "two")


def test_synthetic_images_need_no_disk(tmp_path):
    options = ["--batch-size", 640, "--epochs", 1, "--image-size", 8, "-o", tmp_path / "run"]
    log = said(train_program, "--loader", "synthetic", "--model", "vitc_nano", *SMALL, *options)
    assert "1000 classes" in log


def test_the_average_of_the_weights_is_as_good_as_the_weights(few_digits, tmp_path):
    options = ["--recipe", "digits", "--epochs", 20, "--model-ema"]
    train(few_digits, "-o", tmp_path / "run", *options)
    assert read_summary(tmp_path / "run" / "summary.csv")[-1].val_top1 > 80


def test_one_bad_image_in_each_split_is_listed_and_ends_nothing(few_digits, tmp_path):
    data = shutil.copytree(few_digits, tmp_path / "data")
    bad = [next((data / split / "1").iterdir()) for split in ("train", "val")]
    for path in bad:
        path.write_bytes(path.read_bytes()[:300])
    log = train(data, "-o", tmp_path / "run")
    assert "of 14," in log
    assert log.count("warning: 2 images cannot be read") == 1
    listed = (tmp_path / "run" / "bad_files.txt").read_text()
    assert all(str(path) in listed for path in bad)
