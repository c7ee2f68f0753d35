from dataclasses import replace

import pytest
import torch

from fastvitc import complexity, data
from fastvitc.data import synthetic_index
from fastvitc.data.pil import PilLoader
from fastvitc.training.assembly import assemble
from fastvitc.training.meter import duration
from fastvitc.training.process import Process
from fastvitc.training.recipes import recipe_settings
from fastvitc.training.words import (
    explain_loader,
    introduction,
    unused_devices,
    yardstick,
)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "0 s"),
        (59.4, "59 s"),
        (60, "1 min"),
        (200, "3 min 20 s"),
        (3600, "1 h"),
        (7500, "2 h 5 min"),
        (86400 + 30, "1 d"),
        (4 * 86400 + 6 * 3600 + 59, "4 d 6 h"),
    ],
)
def test_a_time_is_told_in_its_two_largest_units(seconds, words):
    assert duration(seconds) == words


@pytest.fixture(scope="module")
def parts():
    settings = recipe_settings("digits").changed(
        loader="synthetic", compile=False, batch_size=4, peak_tflops=2.0, threads=None
    )
    images = (synthetic_index(split, 8, 3) for split in ("train", "val"))
    return assemble(settings, Process(0, 1, torch.device("cpu")), *images)


def test_training_counts_as_three_forward_passes_with_a_multiply_add_as_two(parts):
    found = yardstick(parts)
    assert (found.peak, found.source) == (2e12, "as given")
    assert found.per_image == 6 * complexity(parts.model).flops
    assert found.share(100.0) == pytest.approx(100.0 * found.per_image / 2e12)


def test_smaller_images_count_as_the_work_that_they_are(parts):
    parts.model.image_size = (16, 16)
    try:
        assert (
            yardstick(parts).per_image
            == 6 * complexity(replace(parts.model.config, image_size=(16, 16))).flops
        )
    finally:
        parts.model.image_size = parts.model.config.image_size


def test_the_log_opens_with_model_device_ops_data_recipe_and_yardstick(parts, tmp_path):
    lines = introduction(parts, yardstick(parts), tmp_path)
    starts = (
        "vitc_nano: ",
        "device: ",
        "versions: ",
        "ops: ",
        "data: 8 ",
        "recipe digits: ",
        "MFU: ",
        "compile: no",
        "output: ",
    )
    assert len(lines) == len(starts)
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True))


def test_the_line_on_the_data_says_which_loader_and_why(parts, tmp_path):
    line = introduction(parts, yardstick(parts), tmp_path)[4]
    assert line.endswith("in 3 classes, SyntheticLoader (as given)")


@pytest.mark.parametrize(
    ("asked", "device", "dali", "why"),
    [
        ("auto", "cpu", True, "auto takes it on a CPU"),
        ("auto", "cuda", True, "auto takes it on a GPU"),
        ("auto", "cuda", False, "DALI is not installed"),
        ("pil", "cuda", True, "as given"),
    ],
)
def test_the_reason_for_a_loader_is_the_rule_that_chose_it(asked, device, dali, why, parts, monkeypatch):
    monkeypatch.setattr(data, "_has_dali", lambda: dali)
    loader = PilLoader(replace(parts.train_loader.config, workers=3))
    object.__setattr__(loader.config, "device", torch.device(device))
    assert explain_loader(loader, asked) == f"PilLoader, 3 worker processes ({why})"


def test_a_run_on_one_of_several_gpus_says_how_to_use_all(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert "torchrun --nproc-per-node 8 " in unused_devices(Process(0, 1, torch.device("cuda", 0)))
    assert unused_devices(Process(0, 8, torch.device("cuda", 0))) == ""
    assert unused_devices(Process(0, 1, torch.device("cpu"))) == ""
