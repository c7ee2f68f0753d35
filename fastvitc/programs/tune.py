"""`fastvitc-tune`: measures the backends of the ops on this device, so that auto takes the fastest from then on."""

import sys
from dataclasses import dataclass, field, replace
from typing import Annotated

import tyro

from fastvitc.kernels import measured
from fastvitc.models.config import as_size, preset
from fastvitc.programs.command import parse, run_command
from fastvitc.ranges import at_least, check_ranges
from fastvitc.training.process import process_group
from fastvitc.training.settings import ImageSize
from fastvitc.tuning.machine import PRECISIONS, Precision, can_compile, describe, fast_precision
from fastvitc.tuning.measure import Setting
from fastvitc.tuning.tune import ROUNDS, table, tune

PROGRAM = "fastvitc-tune"


@dataclass(frozen=True)
class TuneSettings:
    """Measure the backends of each op that a model uses, forward and backward, and keep the fastest for auto."""

    model: str = "vitc_4gf"
    """The preset whose shapes are measured, see fastvitc-info."""
    batch_size: Annotated[int, at_least(1), tyro.conf.arg(aliases=["-b"])] = 64
    """Images per batch."""
    precision: Precision = field(default_factory=fast_precision)
    """bf16: autocast. What is measured holds for ops in this dtype."""
    image_size: ImageSize = None
    """Size in pixels; by default the model's."""
    device: str = "auto"
    """cuda, cpu, or auto."""
    compile: bool = field(default_factory=can_compile)
    """torch.compile each op, as training does: by default on a GPU, and on a CPU with a C++ compiler and Python.h."""
    rounds: Annotated[int, at_least(1)] = ROUNDS
    """Passes over the backends; the median counts."""


def run(settings: TuneSettings) -> str:
    """Measure as the settings say; the table and what auto takes from now on."""
    check_ranges(settings, flags=True)
    config = preset(settings.model)
    if settings.image_size is not None:
        config = replace(config, image_size=as_size(settings.image_size))
    dtype = PRECISIONS[settings.precision]
    with process_group(settings.device) as process:
        setting = Setting(
            settings.model, config, settings.batch_size, dtype, process.device, settings.compile
        )
        results = tune(setting, settings.rounds)
        picks = ", ".join(f"{op} {measured(process.device, dtype)[op].backend}" for op in results)
        return (
            f"{settings.model} at {config.image_size[0]}x{config.image_size[1]}, batch {settings.batch_size}, "
            f"{settings.precision}, {describe(process.device)}; forward and backward\n"
            f"{table(results)}\nauto takes: {picks}"
        )


def main() -> None:
    print(run(parse(TuneSettings, PROGRAM, sys.argv[1:])))


def cli() -> None:
    run_command(PROGRAM, main)


if __name__ == "__main__":
    cli()
