"""The programs, in processes of their own as a user runs them, or quicker in this one."""

import hashlib
import os
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from unittest.mock import patch

from safetensors.torch import load_file

from fastvitc.programs import train as train_program

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


def said(module, *args):
    """What a program prints, run in this process."""
    with patch.object(sys, "argv", [module.PROGRAM, *map(str, args)]), redirect_stdout(StringIO()) as out:
        module.main()
    return out.getvalue()


def train(folder, *args):
    """What a small run on a folder prints, trained in this process."""
    return said(train_program, "--data-dir", folder, "--model", "vitc_nano", *SMALL, *args)


def weights_hash(folder):
    weights = load_file(Path(folder) / "last" / "model.safetensors")
    digest = hashlib.sha256()
    for key in sorted(weights):
        digest.update(key.encode() + weights[key].numpy().tobytes())
    return digest.hexdigest()
