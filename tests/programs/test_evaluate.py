import re
import shutil

import torch
from running import program, said, train

from fastvitc.models.saved import load_model
from fastvitc.programs import evaluate as evaluate_program
from fastvitc.training.report import read_summary


def test_evaluation_of_the_saved_model_repeats_the_runs_accuracy(finished, few_digits):
    folder, _ = finished
    done = program("evaluate", folder / "last", "--data-dir", few_digits, "--workers", 0)
    assert done.returncode == 0, done.stderr
    top1 = read_summary(folder / "summary.csv")[-1].val_top1
    assert f"top-1 {top1:.2f}%" in done.stdout
    assert "of 15)" in done.stdout


def test_evaluation_refuses_data_of_other_classes(finished, few_digits, tmp_path, ends):
    shutil.copytree(few_digits / "val" / "0", tmp_path / "val" / "zero")
    code, message = ends(evaluate_program, finished[0] / "best", "--data-dir", tmp_path)
    assert code == 2
    assert "trained on 3 classes (0, 1, 2, ...), the folder has 1 (zero, ...)" in message


def test_evaluation_reads_other_libraries_checkpoints(finished, few_digits, tmp_path):
    from fastvitc.convert import to_timm

    model = load_model(finished[0] / "last")
    torch.save(to_timm(model.state_dict()), tmp_path / "timm.pth")
    ours = said(evaluate_program, finished[0] / "last", "--data-dir", few_digits)
    theirs = said(
        evaluate_program, tmp_path / "timm.pth", "--source", "timm", "--model", "vitc_nano",
        "--data-dir", few_digits, "--crop-ratio", "0.875",
    )  # fmt: skip
    assert theirs.split(",")[0] == ours.split(",")[0]


def test_an_image_that_cannot_be_read_is_named_and_not_counted(finished, few_digits, tmp_path, capsys):
    data = shutil.copytree(few_digits, tmp_path / "data")
    bad = next((data / "val" / "1").iterdir())
    bad.write_bytes(b"<html>")
    printed = said(evaluate_program, finished[0] / "last", "--data-dir", data, "--workers", 0)
    assert "of 14)" in printed
    assert f"warning: cannot read the image {bad}" in capsys.readouterr().err


def test_a_model_of_grey_images_and_chosen_classes_is_evaluated_as_in_its_run(few_digits, tmp_path):
    (tmp_path / "classes.txt").write_text("2\n0\n")
    own = ["--in-chans", 1, "--interpolation", "bicubic", "--class-map", tmp_path / "classes.txt"]
    log = train(few_digits, "-o", tmp_path / "run", *own)
    found = re.findall(r"top-1 ([\d.]+)%.* of 10,", log)[-1]
    said_now = said(evaluate_program, tmp_path / "run" / "last", "--data-dir", few_digits)
    assert "2 of the folder's 3 classes are evaluated" in said_now
    assert f"top-1 {found}%" in said_now
