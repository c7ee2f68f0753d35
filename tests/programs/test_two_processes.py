"""Two processes train one model, and go on where they were stopped."""

import os
import subprocess
import sys

import pytest
from running import SMALL, program, weights_hash

from fastvitc.models.saved import load_model
from fastvitc.training.state import newest_state

_KEEPING_THE_FIRST_EPOCH = """
import shutil
from fastvitc.programs import train
from fastvitc.training import run
epoch_of = run.Run._epoch
def keep(self, *rest):
    if self.epoch == 1 and self.folder is not None:
        self.folder.finish()
        shutil.copytree(self.folder.path, self.folder.path.with_name("part"))
    epoch_of(self, *rest)
run.Run._epoch = keep
train.main()
"""


@pytest.fixture(scope="module")
def runs(few_digits, tmp_path_factory):
    """The folder of a run "whole" of two processes and, as "part", of what it had left after one epoch; its log."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "keep.py").write_text(_KEEPING_THE_FIRST_EPOCH)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(folder / "keep.py"), "--data-dir", str(few_digits), "--model", "vitc_nano", *SMALL]
    command += ["--batch-size", "4", "--grad-accum-steps", "2", "--epochs", "3", "--model-ema"]
    done = subprocess.run(
        [*command, "-o", str(folder / "whole")], capture_output=True, text=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.mark.slow
def test_two_processes_train_one_model(runs):
    folder, log = runs
    assert "16 images per step" in log
    assert "of 15," in log
    assert load_model(folder / "whole" / "last")


@pytest.mark.slow
def test_a_resumed_run_of_two_processes_ends_with_the_same_weights(runs):
    folder, _ = runs
    assert newest_state(folder / "part")[1].epoch == 1
    done = program("train", "--resume", folder / "part", processes=2)
    assert done.returncode == 0, done.stderr
    assert weights_hash(folder / "part") == weights_hash(folder / "whole")


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
