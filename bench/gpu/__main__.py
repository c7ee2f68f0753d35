"""Tests and measures everything on one NVIDIA GPU: `python -m bench.gpu --out DIR [--minutes 9] [--dry-run]`.

In this order, within the minutes: the kernels' tests on the device; the ops attention and bn_relu and the stem from a
uint8 image, forward and forward + backward; training steps and inference of the paper's models beside timm's and
torchvision's, eager and compiled; bfloat16 autocast, channels-last. What does not fit in the time is "not measured".

DIR/results.json is replaced whole after every entry, DIR/table.txt is written at the end. Exit codes: 0 done, 1 a test
failed or a contender computes something else, 2 a command line or machine that cannot be. `--dry-run` takes the same
path on a CPU at a tiny scale and measures nothing; TRITON_INTERPRET=0 leaves Triton's slow interpreter out of it.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

if __name__ == "__main__" and "--dry-run" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are first imported

import torch

from bench.gpu.kernel_tests import run_kernel_tests
from bench.gpu.measure import OUT_OF_TIME, Record, not_measured
from bench.gpu.plan import Entry, plan
from bench.gpu.table import table
from bench.gpu.worker import DTYPE, Worker
from fastvitc.files import write_atomically
from fastvitc.tuning.machine import copy_peak, describe, flops_peak, versions

_SETTINGS = (
    "bfloat16 autocast, channels-last, equal weights; CUDA events, median of a pass, L2 overwritten before every call, "
    "passes alternate over the contenders; cudnn.benchmark on; FLOPs: a multiply-add is two, training is 3 x forward; "
    "peak GB: the contender's own tensors and the most that one call adds, shared inputs not counted."
)
_DRY, _WET = "Dry run: nothing measured", "Measured on a GPU"
_TESTS_SHARE = 0.3  # of the whole time
_RESERVE = 5.0  # seconds for the table and the end of processes


class Measurer(Protocol):
    def measure(self, entry: Entry, seconds: float, left: float) -> Record: ...


def _nvidia_smi() -> str | None:
    fields = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu,memory.total"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    names, *values = done.stdout.strip().splitlines()
    return "; ".join(
        f"{n.strip()} {v.strip()}" for n, v in zip(names.split(","), values[0].split(","), strict=True)
    )


def _machine(device: torch.device) -> Record:
    peak, source = flops_peak(device, DTYPE)
    copied = copy_peak(device)
    torch.cuda.empty_cache()
    return {
        "device": describe(device),
        "processors": os.cpu_count(),
        "system": platform.platform(),
        "nvidia_smi": _nvidia_smi(),
        "versions": versions(),
        "flops_peak": peak,
        "flops_peak_source": source,
        "copy_peak": copied,
    }


def measure_all(
    results: Record,
    entries: list[Entry],
    measurer: Measurer,
    total: float,
    deadline: float,
    save: Callable[[], None],
) -> None:
    """Fill in `results["entries"]` in order, saved after each; those past the deadline are not measured.

    `total`: seconds of the whole run, of which each entry has its share; `deadline` is of time.monotonic.
    """
    for entry, record in zip(entries, results["entries"], strict=True):
        started = time.monotonic()
        if started >= deadline:
            record.update(not_measured(OUT_OF_TIME))
        else:
            record.pop("reason", None)
            record.update(measurer.measure(entry, entry.share * total, deadline - started))
        record["took"] = time.monotonic() - started
        save()
        print(f"{entry.title}: {record['state']} ({record['took']:.0f} s)", flush=True)


def _planned(entry: Entry) -> Record:
    named = {k: v for k, v in asdict(entry).items() if k != "batch"}
    return {"title": entry.title, **named, "planned_batch": entry.batch, **not_measured("not reached")}


def main(args: list[str] | None = None) -> None:
    started = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json and table.txt")
    parser.add_argument("--minutes", type=float, default=9.0, help="wall time of the whole run")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on a CPU: nothing is measured")
    options = parser.parse_args(args)
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("PyTorch finds no CUDA device here; --dry-run takes the same path without one")
    device = torch.device("cpu" if options.dry_run else "cuda")
    total = 60 * options.minutes
    deadline = started + total - _RESERVE
    entries = plan(options.dry_run)
    results: Record = {
        "label": _DRY if options.dry_run else _WET,
        "machine": _machine(device),
        "settings": _SETTINGS,
        "kernel_tests": not_measured("not reached"),
        "entries": [_planned(entry) for entry in entries],
    }

    def save() -> None:
        results["seconds"] = time.monotonic() - started
        text = json.dumps(results, indent=1) + "\n"
        write_atomically(options.out / "results.json", lambda path: path.write_text(text))

    save()
    print(f"{results['label']}: {results['machine']}", flush=True)
    results["kernel_tests"] = run_kernel_tests(_TESTS_SHARE * total, options.dry_run)
    save()
    with Worker(options.dry_run) as worker:
        measure_all(results, entries, worker, total, deadline, save)
    results["machine"]["nvidia_smi_after"] = _nvidia_smi()
    save()
    text = table(results)
    write_atomically(options.out / "table.txt", lambda path: path.write_text(text))
    print(text)
    states = [c["state"] for entry in results["entries"] for c in entry.get("contenders", {}).values()]
    sys.exit(int("wrong" in states or bool(results["kernel_tests"].get("failed"))))


if __name__ == "__main__":
    main()
