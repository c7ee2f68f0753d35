"""Curves of accuracy against seconds, and what a race reads from them."""

import csv
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastvitc.files import write_atomically


@dataclass(frozen=True)
class Point:
    """The end of an epoch: seconds since the program was started, and validation top-1 in percent."""

    seconds: float
    top1: float


Curve = Sequence[Point]


def time_to(curve: Curve, top1: float) -> float | None:
    """Seconds to the first epoch's end with at least this accuracy; None where there is none."""
    return next((point.seconds for point in curve if point.top1 >= top1), None)


def accuracy_at(curve: Curve, seconds: float) -> float:
    """The accuracy of the last epoch that ended by then; 0 before the first."""
    return next((point.top1 for point in reversed(curve) if point.seconds <= seconds), 0.0)


@dataclass(frozen=True)
class Result:
    """A racer beside the peer: medians over the seeds.

    Attributes:
        last: accuracy at the run's end.
        whole: seconds of the whole run.
        to_target: seconds to the peer's median accuracy at its end; None where fewer than half of the seeds reach it.
        share: `to_target` over the peer's whole run.
        at_equal_time: accuracy when the peer's run ends.
    """

    last: float
    whole: float
    to_target: float | None
    share: float | None
    at_equal_time: float


def results(curves: Mapping[str, Sequence[Curve]], peer: str) -> dict[str, Result]:
    """{racer: its result} from {racer: the curve of each seed}."""
    target = statistics.median(curve[-1].top1 for curve in curves[peer])
    budget = statistics.median(curve[-1].seconds for curve in curves[peer])
    found = {}
    for name, runs in curves.items():
        # A seed that never gets there counts as later than all others.
        times = [time_to(curve, target) or float("inf") for curve in runs]
        reached = statistics.median(times)
        to_target = None if reached == float("inf") else reached
        found[name] = Result(
            last=statistics.median(curve[-1].top1 for curve in runs),
            whole=statistics.median(curve[-1].seconds for curve in runs),
            to_target=to_target,
            share=None if to_target is None else to_target / budget,
            at_equal_time=statistics.median(accuracy_at(curve, budget) for curve in runs),
        )
    return found


def table(found: Mapping[str, Result], peer: str, seeds: int) -> str:
    """The results as a Markdown table."""
    lines = [
        f"| median over {seeds} seeds | top-1 at the end | whole run | to {peer}'s accuracy | of its time "
        "| top-1 at equal time |",
        "|---|---|---|---|---|---|",
    ]
    for name, result in found.items():
        reached = (
            "not reached | " if result.to_target is None else f"{result.to_target:.0f} s | {result.share:.2f}"
        )
        lines.append(
            f"| {name} | {result.last:.2f}% | {result.whole:.0f} s | {reached} | {result.at_equal_time:.2f}% |"
        )
    return "\n".join(lines)


def write_csv(curves: Mapping[str, Sequence[Curve]], path: Path) -> None:
    """racer, seed, epoch, seconds, top1: a row for each epoch."""

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(("racer", "seed", "epoch", "seconds", "top1"))
            for name, runs in curves.items():
                for seed, curve in enumerate(runs):
                    for epoch, point in enumerate(curve, start=1):
                        rows.writerow((name, seed, epoch, f"{point.seconds:.2f}", f"{point.top1:.3f}"))

    write_atomically(path, write)


def draw(curves: Mapping[str, Sequence[Curve]], peer: str, title: str, path: Path) -> None:
    """Accuracy against seconds: the median over the seeds, a band from the least to the most, the peer's end dashed."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, runs in curves.items():
        epochs = list(zip(*runs, strict=True))
        seconds = [statistics.median(point.seconds for point in points) for points in epochs]
        by_epoch = [[point.top1 for point in points] for points in epochs]
        (line,) = axes.plot(
            seconds, [statistics.median(values) for values in by_epoch], marker=".", label=name
        )
        low, high = ([pick(values) for values in by_epoch] for pick in (min, max))
        axes.fill_between(seconds, low, high, alpha=0.2, color=line.get_color(), linewidth=0)
    axes.axhline(
        statistics.median(c[-1].top1 for c in curves[peer]), color="grey", linestyle="--", linewidth=1
    )
    axes.set(
        xlabel="seconds from the program's start", ylabel="validation top-1, %", title=title, xlim=(0, None)
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
