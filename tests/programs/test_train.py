"""End to end: the programs as a user runs them, on a small folder of real digits."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fastvitc.data import digits_folder
from fastvitc.kernels import Measured, record
from fastvitc.kernels.attention import library
from fastvitc.models.saved import load_model
from fastvitc.programs import evaluate as evaluate_program
from fastvitc.programs import train as train_program
from fastvitc.training.report import read_summary
from fastvitc.training.run import Run
from fastvitc.training.state import RunState

SMALL = ["--batch-size", "16", "--epochs", "2", "--warmup-epochs", "1", "--workers", "0", "--no-compile"]


@pytest.fixture(scope="session")
def few_digits(tmp_path_factory):
    """Three classes of digits, 20 training and 5 validation images each."""
    source = digits_folder(tmp_path_factory.mktemp("cache"))
    target = tmp_path_factory.mktemp("digits")
    for split, count in (("train", 20), ("val", 5)):
        for digit in "012":
            (target / split / digit).mkdir(parents=True)
            for path in sorted((source / split / digit).iterdir())[:count]:
                shutil.copy(path, target / split / digit)
    return target


def program(name, *args, processes=1, env=None, timeout=250):
    launcher = [sys.executable, "-W", "error::FutureWarning", "-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    threads = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [*launcher, f"fastvitc.programs.{name}", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **threads, **(env or {})},
    )


@pytest.fixture
def ends(monkeypatch, capsys):
    """Runs a program in this process; gives its exit code and what it said on stderr, on one line."""

    def run(module, *args):
        monkeypatch.setattr(sys, "argv", [module.PROGRAM, *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            module.cli()
        return ended.value.code, " ".join(capsys.readouterr().err.replace("│", " ").split())

    return run


def train(folder, *args, **kwargs):
    done = program("train", "--data-dir", folder, "--model", "vitc_nano", *SMALL, *args, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def weights_hash(folder):
    weights = load_file(Path(folder) / "last" / "model.safetensors")
    digest = hashlib.sha256()
    for key in sorted(weights):
        digest.update(key.encode() + weights[key].numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="session")
def finished(few_digits, tmp_path_factory):
    """A finished run, its folder and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    return folder, train(few_digits, "-o", folder)


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
    assert RunState.load(folder).epoch == 2
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


def test_evaluation_of_the_saved_model_repeats_the_runs_accuracy(finished, few_digits):
    folder, _ = finished
    done = program("evaluate", folder / "last", "--data-dir", few_digits, "--workers", 0)
    assert done.returncode == 0, done.stderr
    top1 = read_summary(folder / "summary.csv")[-1].val_top1
    assert f"top-1 {top1:.2f}%" in done.stdout
    assert "of 15)" in done.stdout


def test_a_seed_fixes_the_weights(finished, few_digits, tmp_path):
    train(few_digits, "-o", tmp_path / "again")
    assert weights_hash(tmp_path / "again") == weights_hash(finished[0])
    train(few_digits, "-o", tmp_path / "other", "--seed", 1)
    assert weights_hash(tmp_path / "other") != weights_hash(finished[0])


def test_a_resumed_run_ends_with_the_same_weights(few_digits, tmp_path, monkeypatch):
    options = ["--model-ema", "--mixup", "0.5", "--cutmix", "0.5", "--drop-path", "0.1", "--precise-bn", "16"]
    options += ["--model-ema-every", "1", "--model-ema-rate", "0.3"]
    options += ["--data-dir", str(few_digits), "--model", "vitc_nano", *SMALL, "--epochs", "3"]
    whole, interrupted = tmp_path / "whole", tmp_path / "interrupted"
    train_program.train(*train_program.read_settings([*options, "-o", str(whole)]))

    epoch_of = Run._epoch

    def stop_in_the_second(self, epoch, *rest):
        if epoch == 1:
            raise KeyboardInterrupt
        epoch_of(self, epoch, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_epoch", stop_in_the_second)
        with pytest.raises(KeyboardInterrupt):
            train_program.train(*train_program.read_settings([*options, "-o", str(interrupted)]))
    assert RunState.load(interrupted).epoch == 1
    train_program.train(*train_program.read_settings(["--resume", str(interrupted)]))
    assert weights_hash(interrupted) == weights_hash(whole)
    assert [row.epoch for row in read_summary(interrupted / "summary.csv")] == [1, 2, 3]


def test_a_resumed_run_keeps_its_backends_unless_told_to_choose_anew(few_digits, tmp_path):
    def measured_fastest(name):
        record(torch.device("cpu"), torch.bfloat16, {"attention": Measured(name, {name: 1.0}, {})})

    def backend_after(*args):
        train_program.train(*train_program.read_settings([*map(str, args)]))
        state = RunState.load(tmp_path / "run")
        assert f"attention={state.backends['attention']}" in state.settings["backend"].split(",")
        return state.backends["attention"]

    measured_fastest("flash")
    begin = ["--data-dir", few_digits, "--model", "vitc_nano", *SMALL, "--epochs", 1, "-o", tmp_path / "run"]
    assert backend_after(*begin) == "flash"
    measured_fastest("torch")
    resume = ["--resume", tmp_path / "run", "--epochs"]
    assert backend_after(*resume, 2) == "flash"
    assert backend_after(*resume, 3, "--backend", "auto") == "torch"


def test_a_backend_that_does_not_take_the_runs_dtype_ends_in_one_message(
    few_digits, tmp_path, ends, monkeypatch
):
    monkeypatch.setattr(library, "unfit", lambda *args: f"it does not take {args[2]}")
    always = ["--data-dir", few_digits, "--model", "vitc_nano", *SMALL, "-o", tmp_path / "run", "--compile"]
    code, message = ends(train_program, *always, "--precision", "fp32", "--backend", "attention=flash")
    assert code == 2
    assert "backend 'flash' cannot run: it does not take torch.float32; use the backend torch" in message


_COMPARE = """
import torch
from fastvitc.models.config import StemConfig, ViTConfig
from fastvitc.training.process import Process, process_group
from fastvitc.training.step import TrainStep
from fastvitc.models.vit import VisionTransformer

def weights(process, rows, accumulate):
    torch.manual_seed(0)
    config = ViTConfig(StemConfig((32,), (8,), (8,)), 32, 64, heads=2, depth=2, image_size=(16, 16), num_classes=4)
    model = VisionTransformer(config)
    step = TrainStep(
        model, [torch.optim.SGD(model.parameters(), lr=0.3)], process, dtype=torch.float32, accumulate=accumulate,
        clip_grad=0.5, compile=False,
    )
    torch.manual_seed(1)
    images, labels = torch.randint(256, (16, 3, 16, 16), dtype=torch.uint8), torch.arange(16) % 4
    for _ in range(3):
        step([(images[part], labels[part], None) for part in rows])
    return torch.cat([p.detach().flatten() for p in model.parameters()])

with process_group("cpu") as process:
    start = 8 * process.rank
    shared = weights(process, [slice(start, start + 4), slice(start + 4, start + 8)], 2)
    alone = weights(Process(0, 1, torch.device("cpu")), [slice(0, 16)], 1)
    assert (shared - alone).abs().max() < 1e-6, (shared - alone).abs().max()
    assert process.world_size == 2
"""


def test_two_processes_take_the_step_of_one_with_all_images(tmp_path):
    (tmp_path / "compare.py").write_text(_COMPARE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(tmp_path / "compare.py")], capture_output=True, text=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


_STOP_BEFORE_THE_SECOND_EPOCH = """
import sys
from fastvitc.programs import train
from fastvitc.training import run
epoch_of = run.Run._epoch
def stop(self, epoch, *rest):
    if epoch == 1:
        sys.exit(3)
    epoch_of(self, epoch, *rest)
run.Run._epoch = stop
train.main()
"""


def test_a_resumed_run_of_two_processes_ends_with_the_same_weights(few_digits, tmp_path):
    options = ["--batch-size", "8", "--epochs", "3", "--model-ema"]
    train(few_digits, "-o", tmp_path / "whole", *options, processes=2)
    (tmp_path / "stop.py").write_text(_STOP_BEFORE_THE_SECOND_EPOCH)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(tmp_path / "stop.py"), "--data-dir", str(few_digits), "--model", "vitc_nano", *SMALL]
    subprocess.run(
        [*command, *options, "-o", str(tmp_path / "part")], capture_output=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert RunState.load(tmp_path / "part").epoch == 1
    done = program("train", "--resume", tmp_path / "part", processes=2)
    assert done.returncode == 0, done.stderr
    assert weights_hash(tmp_path / "part") == weights_hash(tmp_path / "whole")


def test_two_processes_train_one_model(few_digits, tmp_path):
    log = train(few_digits, "-o", tmp_path / "run", "--batch-size", 8, "--grad-accum-steps", 2, processes=2)
    assert "32 images per step" in log
    assert "of 15," in log
    assert load_model(tmp_path / "run" / "last")


def test_the_compiled_run_is_deterministic_and_compiles_nothing_after_its_first_epoch(few_digits, tmp_path):
    options = ["--compile", "--epochs", 3, "--mixup", 0.2, "--cutmix", 0.2, "--grad-accum-steps", 2]
    logs = [train(few_digits, "-o", tmp_path / name, *options) for name in ("one", "two")]
    assert all("compiled anew" not in log for log in logs)
    assert all("first step, compilation included" in log for log in logs)
    assert weights_hash(tmp_path / "one") == weights_hash(tmp_path / "two")


def test_synthetic_images_need_no_disk(tmp_path):
    options = ["--batch-size", 640, "--epochs", 1, "--image-size", 8, "-o", tmp_path / "run"]
    done = program("train", "--loader", "synthetic", "--model", "vitc_nano", *SMALL, *options)
    assert done.returncode == 0, done.stderr
    assert "1000 classes" in done.stdout


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
        (lambda data: (data / "train" / "1" / "0001.jpg").write_bytes(b"<html>"), "0001.jpg"),
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


def test_a_folder_where_a_run_failed_before_its_first_epoch_is_free(few_digits, tmp_path, ends):
    data = shutil.copytree(few_digits, tmp_path / "data")
    good = (data / "train" / "1" / "0001.jpg").read_bytes()
    (data / "train" / "1" / "0001.jpg").write_bytes(b"<html>")
    options = ["--model", "vitc_nano", *SMALL, "-o", tmp_path / "run"]
    assert ends(train_program, "--data-dir", data, *options)[0] == 1
    (data / "train" / "1" / "0001.jpg").write_bytes(good)
    train(data, "-o", tmp_path / "run")


def test_the_average_of_the_weights_is_as_good_as_the_weights(few_digits, tmp_path):
    options = ["--epochs", 20, "--warmup-epochs", 2, "--model-ema"]
    train(few_digits, "-o", tmp_path / "run", *options)
    assert read_summary(tmp_path / "run" / "summary.csv")[-1].val_top1 > 80


def test_a_finished_run_is_not_resumed(finished, ends):
    code, message = ends(train_program, "--resume", finished[0])
    assert code == 2
    assert "has finished its 2 epochs" in message


@pytest.mark.parametrize("damage", ["truncated", "foreign", "missing"])
def test_a_state_that_cannot_be_resumed_is_refused(damage, finished, tmp_path, ends):
    state = tmp_path / "state.pt"
    if damage == "truncated":
        state.write_bytes((finished[0] / "last" / "state.pt").read_bytes()[:5000])
    elif damage == "foreign":
        torch.save({"model_state": {}}, state)
    code, message = ends(train_program, "--resume", state, "-o", tmp_path / "run")
    assert code == 1
    assert str(state) in message
    assert not (tmp_path / "run").exists()


def test_a_users_mistake_shows_no_traceback(few_digits):
    done = program("train", "--data-dir", few_digits, "--model", "vitc_nan")
    assert done.returncode == 2
    assert done.stderr.startswith("fastvitc-train: error: unknown model 'vitc_nan'")
    assert done.stderr.count("\n") == 1


def test_dali_that_is_not_installed_is_asked_for_clearly(few_digits, tmp_path):
    block = tmp_path / "nvidia" / "dali"
    block.mkdir(parents=True)
    (tmp_path / "nvidia" / "__init__.py").write_text("")
    (block / "__init__.py").write_text("raise ModuleNotFoundError('nvidia.dali')")
    args = [
        "--data-dir",
        few_digits,
        *SMALL,
        "--model",
        "vitc_nano",
        "--loader",
        "dali",
        "-o",
        tmp_path / "run",
    ]
    done = program("train", *args, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 2, done.stderr
    assert "pip install" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_evaluation_refuses_data_of_other_classes(finished, few_digits, tmp_path, ends):
    shutil.copytree(few_digits / "val" / "0", tmp_path / "val" / "zero")
    code, message = ends(evaluate_program, finished[0] / "best", "--data-dir", tmp_path)
    assert code == 2
    assert "trained on 3 classes (0, 1, 2, ...), the folder has 1 (zero, ...)" in message


def test_evaluation_reads_other_libraries_checkpoints(finished, few_digits, tmp_path):
    from fastvitc.convert import to_timm

    model = load_model(finished[0] / "last")
    torch.save(to_timm(model.state_dict()), tmp_path / "timm.pth")
    ours = program("evaluate", finished[0] / "last", "--data-dir", few_digits)
    theirs = program(
        "evaluate", tmp_path / "timm.pth", "--source", "timm", "--model", "vitc_nano", "--data-dir", few_digits,
        "--crop-ratio", "0.875",
    )  # fmt: skip
    assert theirs.returncode == 0, theirs.stderr
    assert theirs.stdout.split(",")[0] == ours.stdout.split(",")[0]


def test_info_lists_versions_backends_and_models():
    done = program("info")
    assert done.returncode == 0, done.stderr
    for words in ("torch", "attention: auto takes native", "vitc_36gf", "167,796,008", "35.0258"):
        assert words in done.stdout
