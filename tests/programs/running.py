"""The programs as a user runs them."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

SMALL = ["--batch-size", "16", "--epochs", "2", "--warmup-epochs", "1", "--workers", "0", "--no-compile"]


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
