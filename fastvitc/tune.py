"""`fastvitc-tune`: measures the backends of the ops on this device, so that auto takes the fastest from then on."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import torch
import tyro

from fastvitc.command import parse, run_command
from fastvitc.config import as_size, preset
from fastvitc.distributed import process_group
from fastvitc.engine import PRECISIONS
from fastvitc.errors import FastvitcError, UsageError
from fastvitc.kernels import Choice, Measured, candidates, measured, record, requested
from fastvitc.machine import can_compile, describe, fast_precision
from fastvitc.measure import CALLS, Result, Setting, compare

PROGRAM = "fastvitc-tune"

#: Of backends whose times differ by no more than this share, the one that comes first in the op's order is taken.
TIE = 0.02
_ROUNDS = 15


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
    rounds: int = _ROUNDS
    """Passes over the backends; the median counts."""

    def check(self) -> None:
        """Raise UsageError for numbers out of their range."""
        for name in ("batch_size", "rounds"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if self.image_size is not None and len(self.image_size) not in (1, 2):
            raise UsageError(f"--image-size takes one or two numbers, got {len(self.image_size)}")


def measures_at_start(device: torch.device) -> bool:
    """Whether training measures by itself: on a GPU. On a CPU the fixed order holds until `fastvitc-tune` is run."""
    return device.type == "cuda"


def unmeasured(device: torch.device, dtype: torch.dtype, backend: Choice) -> bool:
    """Whether auto is asked for an op with several candidates, of which one at least was never measured here."""
    known = measured(device, dtype)
    return any(
        requested(op, backend) == "auto"
        and len(names) > 1
        and not (op in known and known[op].milliseconds.keys() >= set(names))
        for op, names in candidates(device).items()
        if op in CALLS
    )


def fastest(results: Sequence[Result]) -> str | None:
    """The backend to take of results in the op's order of preference; None where none has a time."""
    times = {r.backend: r.milliseconds for r in results if r.milliseconds is not None}
    return next((b for b, ms in times.items() if ms <= (1 + TIE) * min(times.values())), None)


def tune(setting: Setting, rounds: int = _ROUNDS) -> dict[str, list[Result]]:
    """Measure every op with a choice, record what is fastest, return {op: results in the order of preference}.

    Raises:
        FastvitcError: an op of which no backend could be measured; nothing is recorded then.
    """
    subject = {
        "model": setting.model,
        "batch_size": setting.batch_size,
        "dtype": str(setting.dtype).removeprefix("torch."),
        "image_size": list(setting.config.image_size),
        "compile": setting.compile,
    }
    results, found = {}, {}
    for op, names in candidates(setting.device).items():
        if op not in CALLS:
            continue
        if len(names) > 1:
            results[op] = compare(setting, op, names, rounds)
        else:
            results[op] = [Result(names[0], reason="the only one; not measured")]
        best = fastest(results[op]) if len(names) > 1 else names[0]
        if best is None:
            reasons = "; ".join(f"{r.backend}: {r.reason}" for r in results[op])
            raise FastvitcError(f"{op}: no backend could be measured: {reasons}")
        times = {r.backend: None if r.milliseconds is None else round(r.milliseconds, 4) for r in results[op]}
        found[op] = Measured(best, times, subject)
    record(setting.device, setting.dtype, found)
    return results


def table(results: Mapping[str, Sequence[Result]]) -> str:
    """Results as text; the ratio is to the fastest."""
    lines = [f"{'op':<10} {'backend':<10} {'ms':>10} {'ratio':>6} {'error':>8}"]
    for op, rows in results.items():
        best = min((r.milliseconds for r in rows if r.milliseconds is not None), default=None)
        for r in rows:
            ms = "-" if r.milliseconds is None else f"{r.milliseconds:.3f}"
            ratio = "-" if r.milliseconds is None or best is None else f"{r.milliseconds / best:.2f}"
            error = "-" if r.error is None else f"{r.error:.1e}"
            lines.append(
                f"{op:<10} {r.backend:<10} {ms:>10} {ratio:>6} {error:>8}  {r.reason or ''}".rstrip()
            )
    return "\n".join(lines)


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
