"""The lines of "Several processes" in fastvitc/README.md, as they stand there but for the settings and the numbers."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from running import SMALL

import fastvitc
from fastvitc.training.state import RunState, newest_state, state_files

_TEXT = Path(fastvitc.__file__).with_name("README.md").read_text()
LAUNCHES, SLURM = re.findall(r"```bash\n(.*?)```", _TEXT.partition("## Several processes")[2], re.S)[:2]
LINES = [line for line in LAUNCHES.splitlines() if line.startswith(("fastvitc-train", "torchrun"))]

# What Slurm does here: one node, two tasks, and a requeue that is written down.
_SRUN = """
#!/bin/bash
trap 'kill -USR1 $(jobs -p)' USR1
for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & done
for job in $(jobs -p); do while kill -0 $job 2>/dev/null; do wait $job; code=$?; done; done
exit $code
"""
_SCONTROL = """
#!/bin/bash
[ "$1" = show ] && echo 127.0.0.1 || echo "$@" >> "$REQUEUED"
"""


@pytest.fixture
def launched(few_digits, tmp_path):
    """Starts a script with the settings of a short run in tmp_path / "run"."""
    settings = ["--data-dir", few_digits, "--model", "vitc_nano", *SMALL, "--batch-size", 8, "--epochs", 2]
    settings += ["--output", tmp_path / "run", "--resume", "auto"]
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", _SRUN), ("scontrol", _SCONTROL)):
        (tmp_path / "bin" / name).write_text(text.lstrip())
        (tmp_path / "bin" / name).chmod(0o755)

    def start(script, *more):
        own = f'settings="{" ".join(map(str, [*settings, *more]))}"'
        script = re.sub("settings=.*", lambda _: own, script).replace("per-node 8", "per-node 2")
        environment = {
            **os.environ,
            "PATH": os.pathsep.join(
                [str(tmp_path / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
            ),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "TRITON_INTERPRET": "0",
            "REQUEUED": str(tmp_path / "requeued"),
        }
        return subprocess.Popen(
            ["bash", "-c", script], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    return start


def ended(*runs):
    """What runs that succeed say."""
    outputs = [run.communicate(timeout=200) for run in runs]
    assert not any(run.returncode for run in runs), outputs
    return "".join(out for out, _ in outputs)


@pytest.mark.full
@pytest.mark.parametrize("line", LINES)
def test_a_launch_line_trains(line, launched, tmp_path):
    script, copies = f"settings=\n{line}", 1
    if "--nnodes 2" in line:
        script, copies = script.replace("per-node 8", "per-node 1").replace("node0", "127.0.0.1"), 2
    said = ended(*(launched(script) for _ in range(copies)))
    assert f"{8 if line.startswith('fastvitc-train') else 16} images per step" in said
    assert newest_state(tmp_path / "run")[1].epoch == 2


def slurm(launched, *more):
    node = "SLURM_NTASKS=2 SLURM_NTASKS_PER_NODE=2 SLURM_JOB_ID=7 SLURM_JOB_NODELIST=here"
    port = 20_000 + os.getpid() % 20_000
    return launched(f"export {node}\n{SLURM}".replace("29500", str(port)), *more)


@pytest.mark.full
def test_the_slurm_job_is_queued_again_until_the_run_is_done(launched, tmp_path):
    job = slurm(launched, "--epochs", 400, "--log-every", 1)
    for line in job.stdout:
        if "epoch 1/" in line:
            subprocess.run(["pkill", "-USR1", "-P", str(job.pid), "-f", "srun"], check=True)
            break
    _, err = job.communicate(timeout=100)
    assert job.returncode == 75
    assert "stopped by SIGUSR1" in err, err
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    epoch = newest_state(tmp_path / "run")[1].epoch
    assert 1 <= epoch < 400
    said = ended(slurm(launched, "--epochs", epoch + 1))
    assert "resumed in epoch" in said
    assert newest_state(tmp_path / "run")[1].epoch == epoch + 1
    failed = slurm(launched, "--lr", 7)  # other settings than the run's
    failed.communicate(timeout=100)
    assert failed.returncode == 2
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"


@pytest.mark.full
def test_statistics_of_all_processes_differ_from_those_of_each(launched, tmp_path):
    line, means = f"settings=\n{LINES[1]}", []
    for more in ([], ["--sync-bn"]):
        said = ended(launched(line, *more, "--epochs", 1, "--save-every", 1, "--keep", 9))
        assert f"conv_stem {'reference' if more else 'native'}" in said
        state = RunState.load(
            state_files(tmp_path / "run")[1]
        )  # within the epoch: they are averaged at its end
        assert state.step > 0
        own = [process["statistics"][0][1] for process in state.processes]
        means.append(torch.equal(*own))
        shutil.rmtree(tmp_path / "run")
    assert means == [False, True]
