"""`fastvitc-info`: what is installed, which backends run here, and the presets."""

import sys
from dataclasses import dataclass

import torch

from fastvitc import __version__
from fastvitc.kernels import availability, chosen, measured
from fastvitc.models.complexity import complexity
from fastvitc.models.config import list_models, preset
from fastvitc.programs.command import parse, run_command
from fastvitc.training.process import pick_device
from fastvitc.tuning.machine import describe, versions

PROGRAM = "fastvitc-info"


@dataclass(frozen=True)
class InfoSettings:
    """Versions, devices, the ops' backends and why some cannot run here, and the model presets."""

    device: str = "auto"
    """The device whose backends are listed: cuda, cpu, or auto."""


def report(settings: InfoSettings) -> str:
    """The whole report as text."""
    device = pick_device(settings.device)
    lines = [f"fastvitc {__version__}"]
    lines += [f"  {name} {version}" for name, version in versions().items()]
    lines += ["", "devices", f"  cpu: {describe(torch.device('cpu'))}"]
    gpus = [f"  cuda:{i}: {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    lines += gpus or ["  cuda: none found"]
    lines += ["", f"backends on {device.type}"]
    picks = chosen(device)
    for op, backends in availability(device).items():
        states = (f"{name} ({'ok' if reason is None else reason})" for name, reason in backends.items())
        lines.append(f"  {op}: auto takes {picks[op]} ({_why(op, picks[op], device)}); {', '.join(states)}")
    lines += ["", "models; FLOPs are multiply-adds and bias additions of one image"]
    lines.append(f"  {'name':<12} {'pixels':>9} {'parameters':>12} {'GFLOPs':>8} {'M acts':>8}")
    for name in list_models():
        counts, (height, width) = complexity(name), preset(name).image_size
        lines.append(
            f"  {name:<12} {f'{height}x{width}':>9} {counts.params:>12,} {counts.flops / 1e9:>8.4f} "
            f"{counts.acts / 1e6:>8.3f}"
        )
    return "\n".join(lines)


def _why(op: str, backend: str, device: torch.device) -> str:
    """Where auto's choice comes from."""
    known = measured(device).get(op)
    if known is None or known.backend != backend:
        return "the first of the order; not measured"
    height, width = known.subject["image_size"]
    times = [f"{name} {ms:.3f} ms" for name, ms in known.milliseconds.items() if ms is not None]
    return (
        f"measured in {known.subject['dtype']} on {known.subject['model']}, batch {known.subject['batch_size']}, "
        f"{height}x{width}: {', '.join(times) or 'the only one'}"
    )


def main() -> None:
    print(report(parse(InfoSettings, PROGRAM, sys.argv[1:])))


def cli() -> None:
    run_command(PROGRAM, main)


if __name__ == "__main__":
    cli()
