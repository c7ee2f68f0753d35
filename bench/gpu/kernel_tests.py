"""Runs the kernels' own tests on the device, in a process with a time limit."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from bench.gpu.measure import Record, not_measured

_ROOT = Path(__file__).parents[2]
_WITH_HYPOTHESIS = ("tests/kernels/attention", "tests/kernels/bn_relu", "tests/kernels/conv_stem")
_WITHOUT = ("tests/training/test_triton_training.py",)
_PROCESSES = 12  # each compiles kernels


def run_kernel_tests(seconds: float, dry_run: bool, targets: tuple[str, ...] | None = None) -> Record:
    """Counts of passed, failed and skipped, failures with the end of their message, and the end of the output.

    Outcomes up to the time limit are kept. Warnings are not errors here: they differ between versions.
    """
    if find_spec("pytest") is None:
        return not_measured("pytest is not installed")
    remarks = []
    if targets is None:
        targets = (*_WITH_HYPOTHESIS, *_WITHOUT)
        if find_spec("hypothesis") is None:
            targets = _WITHOUT
            remarks.append(f"hypothesis is not installed: {', '.join(_WITH_HYPOTHESIS)} were not run")
    # Without addopts, which are strict about settings of plugins that may be missing.
    command = [sys.executable, "-m", "pytest", *targets, "-p", "bench.gpu.outcomes", "-p", "no:cacheprovider"]
    command += ["-o", "addopts=", "-W", "default", "-q", "--tb=short"]
    if dry_run:
        command += ["-k", "refused"]
    elif find_spec("xdist") is not None:
        command += ["-n", str(min(_PROCESSES, os.cpu_count() or 1))]
    with tempfile.TemporaryDirectory() as folder:
        outcomes, output = Path(folder) / "outcomes", Path(folder) / "output"
        outcomes.touch()
        paths = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": paths, "FASTVITC_OUTCOMES": str(outcomes)}
        started = time.monotonic()
        code = _run(command, environment, output, seconds)
        record = _counted(outcomes)
        tail = output.read_text(errors="replace")[-4000:]
    if code is None:
        remarks.append(f"stopped after {seconds:.0f} s: the rest was not run")
    return {
        "state": "measured" if record["passed"] or record["failed"] else "not measured",
        "reason": "; ".join(remarks),
        **record,
        "exit_code": code,
        "seconds": time.monotonic() - started,
        "tail": tail,
    }


def _run(command: list[str], environment: dict[str, str], output: Path, seconds: float) -> int | None:
    """The exit code; None where the time was up and the process was ended with those that it started."""
    with output.open("w") as file:
        process = subprocess.Popen(
            command, cwd=_ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, preexec_fn=os.setpgrp
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _counted(outcomes: Path) -> Record:
    """A test that has several outcomes (a failure, and the end of its process) has failed."""
    found: dict[str, tuple[str, str]] = {}
    for line in outcomes.read_text().splitlines():
        row = json.loads(line)
        if found.get(row["name"], ("", ""))[0] != "failed":
            found[row["name"]] = row["outcome"], row["message"]
    counts = {
        kind: sum(outcome == kind for outcome, _ in found.values())
        for kind in ("passed", "failed", "skipped")
    }
    failures = [{"name": n, "message": m} for n, (outcome, m) in found.items() if outcome == "failed"]
    return {**counts, "failures": failures}
