"""`fastvitc-tune`: measures the backends of the ops on this device, so that auto takes the fastest from then on."""

import sys
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import tyro

from fastvitc.errors import UsageError
from fastvitc.kernels import measured
from fastvitc.models.config import as_size, preset
from fastvitc.programs.command import parse, run_command
from fastvitc.training.process import process_group
from fastvitc.tuning.machine import PRECISIONS, can_compile, describe, fast_precision
from fastvitc.tuning.measure import Setting
from fastvitc.tuning.tune import ROUNDS, table, tune

PROGRAM = "fastvitc-tune"


@dataclass(frozen=True)
class TuneSettings:
    """Measure the backends of each op that a model uses, forward and backward, and keep the fastest for auto."""

    model: str = "vitc_4gf"
    """The preset whose shapes are measured, see fastvitc-info."""
    batch_size: Annotated[int, tyro.conf.arg(aliases=["-b"])] = 64
    """Images per batch."""
    precision: Literal["bf16", "fp32"] = field(default_factory=fast_precision)
    """bf16: autocast. By default where there is a GPU, or a CPU that multiplies in it. The choice holds for ops in this
    dtype."""
    image_size: tuple[int, ...] | None = None
    """Side in pixels, or height and width; by default the model's."""
    device: str = "auto"
    """cuda, cpu, or auto."""
    compile: bool = field(default_factory=can_compile)
    """torch.compile of each op, as training does it: by default where there is a GPU, or a C++ compiler and Python's
    headers."""
    rounds: int = ROUNDS
    """Passes over the backends; the median counts."""

    def check(self) -> None:
        """Raise UsageError for numbers out of their range."""
        for name in ("batch_size", "rounds"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if self.image_size is not None and len(self.image_size) not in (1, 2):
            raise UsageError(f"--image-size takes one or two numbers, got {len(self.image_size)}")


def run(settings: TuneSettings) -> str:
    """Measure as the settings say; the table and what auto takes from now on."""
    settings.check()
    config = preset(settings.model)
    if settings.image_size is not None:
        size = settings.image_size
        config = replace(config, image_size=as_size(size[0] if len(size) == 1 else size))
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
