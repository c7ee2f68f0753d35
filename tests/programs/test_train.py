"""End to end: fastvitc-train on a small folder of real digits."""

import json
import os
import subprocess
import sys

import torch
import yaml
from running import SMALL, program, train, weights_hash

from fastvitc.models.saved import load_model
from fastvitc.training.report import read_summary
from fastvitc.training.state import load_state


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
    assert load_state(folder)["epoch"] == 2
    assert list((folder / "tensorboard").iterdir())


def test_the_log_names_convention_peak_backends_and_rates(finished):
    _, log = finished
    for words in (
        "multiply-adds and bias adds",
        "MFU: 3 x forward FLOPs x 2",
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
        model, torch.optim.SGD(model.parameters(), lr=0.3), process, dtype=torch.float32, accumulate=accumulate,
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


def test_the_average_of_the_weights_is_as_good_as_the_weights(few_digits, tmp_path):
    options = ["--epochs", 20, "--warmup-epochs", 2, "--model-ema"]
    train(few_digits, "-o", tmp_path / "run", *options)
    assert read_summary(tmp_path / "run" / "summary.csv")[-1].val_top1 > 80
