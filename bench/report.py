"""Tables and a plot from the suite's JSON: `python -m bench.report results.json [--plot ratios.png]`.

First our best contender beside the best peer, for the models and attention. Then, for each group: the median time of a
call over all passes; the ratio to the best peer, pass by pass, as the median of (peer's time / ours), so that above 1
is faster and a drift of the machine cancels; and the share of the peak that was measured at the start of the same run,
of FLOPs where a group counts them, else of bytes.
"""

import argparse
import json
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One contender of one group. `ratio` is None where no peer was timed."""

    contender: str
    seconds: float
    ratio: float | None
    peak_share: float | None
    images_per_second: float | None

    @property
    def ours(self) -> bool:
        return self.contender.startswith("fastvitc")


def read(path: Path) -> tuple[dict, dict[str, list[Row]]]:
    """(the run's machine, group → rows, fastest first)."""
    results = json.loads(path.read_text())
    machine = results["machine_info"]["fastvitc"]
    groups: dict[str, dict[str, dict[int, dict]]] = defaultdict(lambda: defaultdict(dict))
    for bench in results["benchmarks"]:
        extra = bench["extra_info"]
        groups[bench["group"]][extra["contender"]][extra["number"]] = bench
    return machine, {name: _rows(contenders, machine) for name, contenders in groups.items()}


def ratios(times: dict[str, dict[int, float]]) -> dict[str, float | None]:
    """Contender → median over shared passes of the best peer's time / its own; None without a peer or such a pass.

    `times`: contender → pass → seconds. The best peer is the one of the least median; ours start with "fastvitc".
    """
    peers = [name for name in times if not name.startswith("fastvitc")]
    best = times[min(peers, key=lambda name: statistics.median(times[name].values()))] if peers else {}
    found = {}
    for name, by_pass in times.items():
        shared = [best[number] / by_pass[number] for number in by_pass.keys() & best.keys()]
        found[name] = statistics.median(shared) if shared else None
    return found


def _rows(contenders: dict[str, dict[int, dict]], machine: dict) -> list[Row]:
    times = {
        name: {number: bench["stats"]["median"] for number, bench in passes.items()}
        for name, passes in contenders.items()
    }
    medians = {name: statistics.median(by_pass.values()) for name, by_pass in times.items()}
    ratio = ratios(times)
    rows = []
    for name in times:
        extra = next(iter(contenders[name].values()))["extra_info"]
        share = None
        if extra["flops"]:
            share = extra["flops"] / medians[name] / machine["matmul_peak"]
        elif extra["bytes"]:
            share = extra["bytes"] / medians[name] / machine["copy_peak"]
        rate = extra["images"] / medians[name] if extra["images"] else None
        rows.append(Row(name, medians[name], ratio[name], share, rate))
    return sorted(rows, key=lambda row: row.seconds)


def _best(rows: list[Row]) -> Row | None:
    """Our fastest beside peers, the reference left out."""
    ours = (row for row in rows if row.ours and row.ratio is not None and "reference" not in row.contender)
    return min(ours, key=lambda row: row.seconds, default=None)


#: Rows of the headline → how the names of their groups begin and end; the model comes next.
_HEADLINE = {
    "training step": ("training step", ""),
    "inference": ("inference", ""),
    "attention, forward + backward": ("attention", ", forward + backward"),
}


def headline(groups: dict[str, list[Row]]) -> str:
    """In Markdown, a row for each measured group of `_HEADLINE`, a column for each model: ratio (ours; best peer)."""
    cells: dict[str, dict[str, str]] = defaultdict(dict)
    for title, (what, ending) in _HEADLINE.items():
        for name, rows in groups.items():
            best = _best(rows)
            if best and name.startswith(f"{what}, ") and name.endswith(ending):
                peer = min((row for row in rows if not row.ours), key=lambda row: row.seconds)
                model = name.split(", ")[1]
                cells[title][model] = f"{best.ratio:.2f} ({best.contender}; {peer.contender})"
    models = list(dict.fromkeys(model for row in cells.values() for model in row))
    lines = [f"| best peer's time / ours | {' | '.join(models)} |", f"|{'---|' * (1 + len(models))}"]
    for title, row in cells.items():
        lines.append(f"| {title} | {' | '.join(row.get(model, '') for model in models)} |")
    return "\n".join(lines) if cells else ""


def machine_line(device: str, versions: dict[str, str]) -> str:
    """Where and with what something was measured."""
    return f"Machine: {device}; {', '.join(f'{name} {version}' for name, version in versions.items())}."


def table(machine: dict, groups: dict[str, list[Row]]) -> str:
    """The report in Markdown."""
    lines = [
        machine_line(machine["device"], machine["versions"]),
        f"dtype {machine['dtype']}, batch {machine['batch_size']}. {machine['convention']}. Peaks measured in the same "
        f"run: {machine['matmul_peak'] / 1e12:.3g}e12 FLOP/s, {machine['copy_peak'] / 1e9:.3g}e9 B/s.",
        "Ratio: the best peer's time over this one's, median over alternating passes; above 1 is faster.",
        "",
        headline(groups),
    ]
    for name, rows in groups.items():
        lines += [
            "",
            f"### {name}",
            "",
            "| | median, ms | ratio | of peak | images/s |",
            "|---|---|---|---|---|",
        ]
        for row in rows:
            cells = [
                f"**{row.contender}**" if row.ours else row.contender,
                f"{1e3 * row.seconds:.3f}",
                "" if row.ratio is None else f"{row.ratio:.2f}",
                "" if row.peak_share is None else f"{row.peak_share:.1%}",
                "" if row.images_per_second is None else f"{row.images_per_second:,.0f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(groups: dict[str, list[Row]], path: Path) -> None:
    """The ratio of our fastest, the reference left out, to the best peer, as a PNG: a row for what is computed, in it a
    bar for each model. Of what is measured forward and forward + backward, the latter."""
    from matplotlib.figure import Figure

    bars: dict[str, dict[str, float]] = defaultdict(dict)
    for name, rows in groups.items():
        best = _best(rows)
        what, _, rest = name.partition(", ")
        if best and not name.endswith(", forward"):
            bars[rest.partition(", ")[0]][what] = best.ratio
    rows = list(dict.fromkeys(what for ratios in bars.values() for what in ratios))
    height = 0.8 / max(len(bars), 1)
    figure = Figure(figsize=(8, 1.2 + 0.45 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for number, (model, ratios) in enumerate(bars.items()):
        places = [rows.index(what) + (number - (len(bars) - 1) / 2) * height for what in ratios]
        drawn = axes.barh(places, list(ratios.values()), 0.9 * height, label=model)
        axes.bar_label(drawn, fmt="%.2f", padding=3, fontsize=8)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel("time of the best peer / ours; above 1 ours is faster")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    if any(bars):  # of models with names
        axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="written by pytest bench/ --benchmark-json")
    parser.add_argument("--plot", type=Path, help="also draw the ratios into this PNG")
    options = parser.parse_args(args)
    try:
        machine, groups = read(options.results)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        sys.exit(
            f"{options.results} holds no results of this suite ({error!r}); make them with "
            "pytest bench/ --quick --benchmark-json results.json"
        )
    print(table(machine, groups))
    if options.plot:
        plot(groups, options.plot)


if __name__ == "__main__":
    main()
