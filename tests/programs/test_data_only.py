"""fastvitc-train --data-only: the loader without a model."""

import re
import shutil

import pytest
from running import SMALL, program, train

COUNTS = r"loaded (\d+) images with (\d) processes, the first batch after [\d.]+ s: [\d,]+ images/s\n"


def test_the_loader_runs_an_epoch_alone_and_leaves_no_folder(few_digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = train(few_digits, "--data-only", "100")
    assert log.startswith(
        "data: 60 training images in 3 classes, PilLoader, no worker processes (auto takes it on a CPU)\n"
    )
    assert re.search(COUNTS, log).groups() == ("48", "1")  # full batches of 16
    assert log.endswith("\n0 images cannot be read (0.00% of those loaded)\n")
    assert list(tmp_path.iterdir()) == []


def test_the_loader_stops_when_the_time_is_up(few_digits):
    log = train(few_digits, "--data-only", "1e-9", "--batch-size", "4", "--loader", "pil")
    assert re.search(COUNTS, log).groups() == ("8", "1")
    assert "(as given)" in log


def test_a_batch_alone_is_an_epoch(few_digits):
    log = train(few_digits, "--data-only", "100", "--batch-size", "60")
    assert re.search(COUNTS, log).groups() == ("60", "1")


def test_images_that_cannot_be_read_are_counted(few_digits, tmp_path):
    data = shutil.copytree(few_digits, tmp_path / "data")
    next((data / "train" / "1").iterdir()).write_bytes(b"")
    log = train(data, "--data-only", "100", "--batch-size", "12", "--workers", "1")
    assert "PilLoader, 1 worker processes" in log
    assert log.endswith("\n1 images cannot be read (1.67% of those loaded)\n")


@pytest.mark.slow
def test_two_processes_tell_their_rate_together_and_once(few_digits):
    done = program(
        "train", "--data-dir", few_digits, "--model", "vitc_nano", *SMALL, "--data-only", "100", processes=2
    )
    assert done.returncode == 0, done.stderr
    assert re.findall(COUNTS, done.stdout) == [("32", "2")]
    assert done.stdout.count("cannot be read") == 1
