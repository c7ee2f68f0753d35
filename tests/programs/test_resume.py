import shutil
import subprocess
import sys
from unittest.mock import patch

import pytest
import torch
from running import SMALL, weights_hash

from fastvitc.kernels import Measured, record
from fastvitc.programs import train as train_program
from fastvitc.training.report import read_summary
from fastvitc.training.run import Run
from fastvitc.training.state import newest_state, state_files


def test_a_resumed_run_ends_with_the_same_weights(few_digits, tmp_path, monkeypatch):
    options = ["--model-ema", "--mixup", "0.5", "--cutmix", "0.5", "--drop-path", "0.1", "--precise-bn", "16"]
    options += ["--model-ema-every", "1", "--model-ema-rate", "0.3"]
    options += ["--data-dir", str(few_digits), "--model", "vitc_nano", *SMALL, "--epochs", "3"]
    whole, interrupted = tmp_path / "whole", tmp_path / "interrupted"
    train_program.train(*train_program.read_settings([*options, "-o", str(whole)]))

    epoch_of = Run._epoch

    def stop_in_the_second(self, *rest):
        if self.epoch == 1:
            raise KeyboardInterrupt
        epoch_of(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_epoch", stop_in_the_second)
        with pytest.raises(KeyboardInterrupt):
            train_program.train(*train_program.read_settings([*options, "-o", str(interrupted)]))
    assert newest_state(interrupted)[1].epoch == 1
    train_program.train(*train_program.read_settings(["--resume", str(interrupted)]))
    assert weights_hash(interrupted) == weights_hash(whole)
    assert [row.epoch for row in read_summary(interrupted / "summary.csv")] == [1, 2, 3]


def test_a_resumed_run_keeps_its_backends_unless_told_to_choose_anew(few_digits, tmp_path):
    def measured_fastest(name):
        record(torch.device("cpu"), torch.bfloat16, {"attention": Measured(name, {name: 1.0}, {})})

    def backend_after(*args):
        train_program.train(*train_program.read_settings([*map(str, args)]))
        _, state = newest_state(tmp_path / "run")
        assert f"attention={state.backends['attention']}" in state.settings["backend"].split(",")
        return state.backends["attention"]

    measured_fastest("flash")
    begin = ["--data-dir", few_digits, "--model", "vitc_nano", *SMALL, "--epochs", 1, "-o", tmp_path / "run"]
    assert backend_after(*begin) == "flash"
    measured_fastest("torch")
    resume = ["--resume", tmp_path / "run", "--epochs"]
    assert backend_after(*resume, 2) == "flash"
    assert backend_after(*resume, 3, "--backend", "auto") == "torch"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--image-size", 64], "--image-size was not set, now 64"),
        (["--weight-decay", 0.7], "--weight-decay was 0.05, now 0.7"),
        (["--opt", "sgd"], "--opt was adamw, now sgd"),
        (["--seed", 3], "--seed was 0, now 3"),
        (["--output", "elsewhere"], "leave out --output"),
    ],
)
def test_a_resumed_run_keeps_its_settings(args, words, finished, ends):
    code, message = ends(train_program, "--resume", finished[0], "--epochs", 3, *args)
    assert (code, words in message) == (2, True), message


def test_a_run_is_not_resumed_on_other_classes(finished, few_digits, tmp_path, ends):
    data = shutil.copytree(few_digits, tmp_path / "data")
    for split in ("train", "val"):
        (data / split / "2").rename(data / split / "two")
    code, message = ends(train_program, "--resume", finished[0], "--epochs", 3, "--data-dir", data)
    assert code == 2
    assert "keeps its classes: it was ['0', '1', '2'], now ['0', '1', 'two']" in message


def test_a_finished_run_is_not_resumed(finished, ends):
    code, message = ends(train_program, "--resume", finished[0])
    assert code == 2
    assert "has finished its 2 epochs" in message


def test_auto_has_nothing_to_do_where_the_run_has_finished(finished, ends, capsys):
    code, message = ends(train_program, "--resume", "auto", "-o", finished[0])
    assert (code, message) == (0, "")


def test_a_folder_in_which_nothing_was_trained_is_free(few_digits, tmp_path):
    options = ["--data-dir", str(few_digits), "--model", "vitc_nano", *SMALL, "-o", str(tmp_path)]
    options += ["--epochs", "1"]

    with patch.object(Run, "_train_epoch", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        train_program.train(*train_program.read_settings(options))
    for again in (options, [*options, "--resume", "auto", "--lr", "0.002"]):
        settings, state = train_program.read_settings(again)
        assert state is None
    train_program.train(settings)
    assert newest_state(tmp_path)[1].settings["lr"] == 0.002


@pytest.mark.parametrize("damage", ["truncated", "foreign", "missing"])
def test_a_state_that_cannot_be_resumed_is_refused(damage, finished, tmp_path, ends):
    state = tmp_path / "state.pt"
    if damage == "truncated":
        state.write_bytes(state_files(finished[0])[0].read_bytes()[:5000])
    elif damage == "foreign":
        torch.save({"model_state": {}}, state)
    code, message = ends(train_program, "--resume", state)
    assert code == 1
    assert str(state) in message
    assert not (tmp_path / "run").exists()


def test_auto_begins_a_run_and_then_goes_on_with_it(few_digits, tmp_path, capsys):
    command = [
        "--data-dir",
        str(few_digits),
        "--model",
        "vitc_nano",
        *SMALL,
        "-o",
        str(tmp_path),
        "--resume",
        "auto",
    ]
    for epochs, resumed in ((1, False), (2, True)):
        train_program.train(*train_program.read_settings([*command, "--epochs", str(epochs)]))
        assert ("resumed in epoch 2, at its start" in capsys.readouterr().out) == resumed
    assert [row.epoch for row in read_summary(tmp_path / "summary.csv")] == [1, 2]


def test_auto_needs_the_folder(few_digits, ends):
    code, message = ends(train_program, "--data-dir", few_digits, "--resume", "auto")
    assert (code, "--resume auto needs the run's folder: give it with --output" in message) == (2, True)


def test_a_folder_that_another_process_writes_to_is_refused(finished, few_digits, tmp_path, ends):
    code = "import sys; from pathlib import Path; from fastvitc.training.folder import RunFolder\n"
    code += "held = RunFolder(Path(sys.argv[1]), 2); print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        options = ["--data-dir", few_digits, "--model", "vitc_nano", *SMALL, "-o", tmp_path / "run"]
        code, message = ends(train_program, *options)
        other.stdin.close()
    assert code == 2
    assert "another run is writing to" in message
