"""Where the time of one training step on the CPU goes: `python -m bench.profile --model vitc_4gf [--compile]`.

Every operation's own time, by torch.profiler, goes to the group that its name, or else the nearest operation around it,
belongs to. For the groups that multiply matrices: their FLOP/s as a share of a large product's in the same run.
"""

import argparse
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, record_function

from bench.contest import CONVENTION
from bench.models import trained_like
from bench.report import machine_line
from bench.test_models import training_step
from fastvitc.models.complexity import complexity, stem_complexity
from fastvitc.models.config import ViTConfig, preset
from fastvitc.programs.command import run_command
from fastvitc.tuning.machine import describe, matmul_peak, versions

CPU, DTYPE = torch.device("cpu"), torch.bfloat16
_STEPS = 3
_OPTIMISER, _OTHER = "optimiser", "other"
#: Group → what the names of its operations hold; the first that fits counts, as kernels that are fused have long names.
_GROUPS = {
    "attention": r"attention|bmm|::_?softmax",
    "norm and activation of the stem": r"batch_?norm|bn_relu|relu|threshold",
    "LayerNorm": r"layer_?norm",
    "GELU": r"gelu",
    "convolutions": r"conv2d|convolution",
    "linear layers": r"linear|addmm|::mm|mmbackward",
    "casts and copies": r"copy|clone|contiguous|::to$|::cat$",
}


@dataclass(frozen=True)
class Row:
    """A group's time in a step, its share of the step, and of the matmul peak where FLOPs are counted."""

    group: str
    seconds: float
    share: float
    peak_share: float | None


def _own_group(name: str) -> str | None:
    return next((group for group, held in _GROUPS.items() if re.search(held, name, re.IGNORECASE)), None)


def group_of(names: Iterable[str]) -> str:
    """The group of an operation from its name and those around it, the nearest first."""
    names = list(names)
    if any(name.startswith("Optimizer.") for name in names):
        return _OPTIMISER
    return next(filter(None, map(_own_group, names)), _OTHER)


def _names(event: FunctionEvent | None) -> Iterable[str]:
    while event is not None:
        yield event.name
        event = event.cpu_parent


def _flops(config: ViTConfig, batch_size: int) -> dict[str, float]:
    """Of a training step, by group."""
    convolutions = 2 * stem_complexity(config).flops
    attention = 4 * config.tokens**2 * config.width * config.depth
    linear = 2 * complexity(config).flops - convolutions - attention
    forward = {"convolutions": convolutions, "attention": attention, "linear layers": linear}
    return {group: 3 * batch_size * flops for group, flops in forward.items()}


def profile(config: ViTConfig, batch_size: int, backend: str, compile: bool, peak: float) -> list[Row]:
    """The groups of a training step of our model, the longest first; `peak` is in FLOP/s."""
    build = partial(trained_like, backend=backend)
    with torch._inductor.config.patch({"cpp.enable_kernel_profile": True}):  # compiled kernels have names too
        step = training_step(build, config, batch_size, CPU, DTYPE, compile).run
        step()
        step()
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(_STEPS):
            with record_function("training step"):
                step()
    seconds = defaultdict(float)
    for event in profiler.events():
        seconds[group_of(_names(event))] += event.self_cpu_time_total / 1e6 / _STEPS
    total, flops = sum(seconds.values()), _flops(config, batch_size)
    rows = [
        Row(group, s, s / total, flops[group] / s / peak if group in flops else None)
        for group, s in seconds.items()
    ]
    return sorted(rows, key=lambda row: -row.seconds)


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.profile", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vitc_1gf", help="a preset")
    parser.add_argument("--batch-size", type=int, default=32, help="images of a step")
    parser.add_argument("--backend", default="auto", help="of the ops: a name, or op=name,op=name")
    parser.add_argument("--compile", action="store_true", help="the step as the trainer compiles it")
    options = parser.parse_args(args)
    peak = matmul_peak(CPU, DTYPE)
    rows = profile(preset(options.model), options.batch_size, options.backend, options.compile, peak)
    print(machine_line(describe(CPU), versions()))
    print(
        f"Training step of {options.model}{', compiled' * options.compile}, backend {options.backend}, dtype bf16, "
        f"batch {options.batch_size}. {CONVENTION}. Matmul peak in the same run: {peak / 1e12:.3g}e12 FLOP/s."
    )
    print("\n| | ms | of the step | of the matmul peak |\n|---|---|---|---|")
    for row in rows:
        peak_share = "" if row.peak_share is None else f"{row.peak_share:.1%}"
        print(f"| {row.group} | {1e3 * row.seconds:.2f} | {row.share:.1%} | {peak_share} |")
    print(
        f"| the step | {1e3 * sum(row.seconds for row in rows):.2f} | {sum(row.share for row in rows):.1%} | |"
    )


if __name__ == "__main__":
    run_command("python -m bench.profile", main)
