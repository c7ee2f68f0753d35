"""Peak resident memory of a training step on the CPU: `python -m bench.memory --model vitc_1gf --batch-size 32`.

Each contender of `bench/test_models.py`, which checks their results, trains in a process of its own, under bfloat16
autocast. Counted is what is resident above the process after its imports: at most during the first step, with what
compiles it, and at most during later ones. Linux only.
"""

import argparse
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from bench.contest import Contest
from bench.models import models
from bench.report import machine_line
from bench.resident import peak, resident
from bench.test_models import model_contests
from fastvitc.models.config import preset
from fastvitc.programs.command import run_command
from fastvitc.tuning.machine import describe, versions

CPU = torch.device("cpu")
_LATER_STEPS = 3


def _training(model: str, batch_size: int) -> Contest:
    return next(model_contests(model, preset(model), batch_size, CPU, torch.bfloat16))


def _measure(model: str, batch_size: int, contender: str) -> tuple[int, int]:
    for build in models(CPU).values():  # every library is loaded, whichever is measured
        build(preset("vitc_nano"))
    build, base = _training(model, batch_size).contenders[contender], resident("VmRSS")
    steps = []

    def first() -> None:
        steps.append(build().run)
        steps[0]()

    def later() -> None:
        for _ in range(_LATER_STEPS):
            steps[0]()

    return peak(first) - base, peak(later) - base


def measure(model: str, batch_size: int, contender: str) -> tuple[int, int]:
    """Bytes at the peak of (first step, later steps), in a fresh process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_measure, model, batch_size, contender).result()


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vitc_1gf", help="a preset")
    parser.add_argument("--batch-size", type=int, default=32, help="images of a step")
    options = parser.parse_args(args)
    print(machine_line(describe(CPU), versions()))
    print("Peak resident memory above the process after its imports, MB.", end="\n\n")
    contest = _training(options.model, options.batch_size)
    print(f"| {contest.name}, bf16 | first step | later steps |")
    print("|---|---|---|")
    for contender in contest.contenders:
        peaks = measure(options.model, options.batch_size, contender)
        print(f"| {contender} | {' | '.join(f'{peak / 1e6:,.0f}' for peak in peaks)} |", flush=True)


if __name__ == "__main__":
    run_command("python -m bench.memory", main)
