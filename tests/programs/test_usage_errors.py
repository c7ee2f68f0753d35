import shutil
import sys

import pytest
from running import SMALL, program, train, weights_hash

from fastvitc.kernels.attention import library
from fastvitc.programs import train as train_program


def test_a_backend_that_does_not_take_the_runs_dtype_ends_in_one_message(
    few_digits, tmp_path, ends, monkeypatch
):
    monkeypatch.setattr(library, "unfit", lambda *args: f"it does not take {args[2]}")
    always = ["--data-dir", few_digits, "--model", "vitc_nano", *SMALL, "-o", tmp_path / "run", "--compile"]
    code, message = ends(train_program, *always, "--precision", "fp32", "--backend", "attention=flash")
    assert code == 2
    assert "backend 'flash' cannot run: it does not take torch.float32; use the backend torch" in message


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--model", "vitc_nan"], "did you mean vitc_nano"),
        (["--image-size", "30"], "multiples of the stem's stride 8"),
        (["--batch-size", "1000"], "make the batch smaller"),
        (["--backend", "fast"], "has no backend 'fast'"),
        (["--backend", "attention=cudnn"], "cuDNN's attention needs an NVIDIA GPU"),
        (["--backend", "atention=torch"], "the op 'atention', which there is not"),
        (["--epochs", "0"], "--epochs must be at least 1"),
        (["--smoothing", "2"], "--smoothing must be from 0 to 1"),
        (["--recipe", "best"], "invalid choice"),
        (["--no-such-flag"], "no-such-flag"),
        (["--grad-accum-steps", "9"], "--grad-accum-steps; lower it"),
        (["--recipe", "paper-50ep", "--model", "vitc_36gf"], "the paper gives 50-epoch settings for"),
        (["--device", "cuda"], "PyTorch finds no CUDA device"),
    ],
)
def test_a_command_line_that_cannot_be_ends_in_one_message_and_code_2(
    args, words, few_digits, tmp_path, ends
):
    always = ["--data-dir", few_digits, "--model", "vitc_nano", *SMALL, "-o", tmp_path / "run"]
    code, message = ends(train_program, *always, *args)
    assert (code, words in message) == (2, True), message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (shutil.rmtree, "there is no folder"),
        (lambda data: shutil.rmtree(data / "val"), "has no folder val"),
        (lambda data: shutil.rmtree(data / "val" / "1"), "only in train: 1"),
        (
            lambda data: [p.unlink() for p in (data / "val" / "1").iterdir()],
            "class folders without images: 1",
        ),
        (
            lambda data: [p.write_bytes(b"<html>") for p in (data / "train" / "1").iterdir()],
            "raise --bad-share",
        ),
    ],
)
def test_bad_data_ends_in_one_message_and_code_1(damage, words, few_digits, tmp_path, ends):
    data = shutil.copytree(few_digits, tmp_path / "data")
    damage(data)
    code, message = ends(
        train_program, "--data-dir", data, "--model", "vitc_nano", *SMALL, "-o", tmp_path / "run"
    )
    assert (code, words in message) == (1, True), message
    assert not (tmp_path / "run" / "last").exists()


def test_an_output_folder_that_cannot_be_written_is_named(few_digits, tmp_path, ends):
    (tmp_path / "file").write_text("")
    args = ["--data-dir", few_digits, "--model", "vitc_nano", *SMALL, "-o", tmp_path / "file" / "run"]
    code, message = ends(train_program, *args)
    assert code == 1
    assert "cannot write to the output folder" in message


def test_another_runs_folder_is_not_overwritten(finished, few_digits, ends):
    before = weights_hash(finished[0])
    code, message = ends(
        train_program, "--data-dir", few_digits, "--model", "vitc_nano", *SMALL, "-o", finished[0]
    )
    assert code == 2
    assert "already holds a run" in message
    assert weights_hash(finished[0]) == before


def test_a_folder_where_a_run_failed_before_its_first_epoch_is_free(few_digits, tmp_path, ends):
    options = ["--model", "vitc_nano", *SMALL, "-o", tmp_path / "run"]
    data = shutil.copytree(few_digits, tmp_path / "data")
    for path in (data / "train" / "1").iterdir():
        path.write_bytes(b"<html>")
    assert ends(train_program, "--data-dir", data, *options)[0] == 1
    train(few_digits, "-o", tmp_path / "run")


def test_a_users_mistake_shows_no_traceback(few_digits):
    done = program("train", "--data-dir", few_digits, "--model", "vitc_nan")
    assert done.returncode == 2
    assert done.stderr.startswith("fastvitc-train: error: unknown model 'vitc_nan'")
    assert done.stderr.count("\n") == 1


def test_dali_that_is_not_installed_is_asked_for_clearly(few_digits, tmp_path, ends, monkeypatch):
    monkeypatch.delitem(sys.modules, "fastvitc.data.dali", raising=False)
    for name in ("nvidia.dali", "nvidia.dali.fn", "nvidia.dali.types"):
        monkeypatch.setitem(sys.modules, name, None)
    always = ["--data-dir", few_digits, *SMALL, "--model", "vitc_nano", "-o", tmp_path / "run"]
    code, message = ends(train_program, *always, "--loader", "dali")
    assert code == 2
    assert "pip install" in message
    assert not (tmp_path / "run").exists()
