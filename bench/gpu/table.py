"""The results as text."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from bench.gpu.measure import Record
from bench.report import ratios


@dataclass(frozen=True)
class Row:
    """One contender that was timed; None where a figure has no meaning or no peer was timed."""

    contender: str
    seconds: float
    host_seconds: float
    images_per_second: float
    mfu: float | None
    gigabytes_per_second: float | None
    peak_gigabytes: float
    ratio: float | None
    parity_error: float


def rows(entry: Record, flops_peak: float) -> list[Row]:
    """The timed contenders of an entry, fastest first. A contender's time is the median of its passes."""
    timed = {n: c for n, c in entry.get("contenders", {}).items() if c["state"] == "measured"}
    ratio = ratios({name: dict(enumerate(c["times"])) for name, c in timed.items()})
    found = []
    for name, contender in timed.items():
        seconds = statistics.median(contender["times"])
        found.append(
            Row(
                name,
                seconds,
                contender["host_seconds"],
                entry["images"] / seconds,
                entry["flops"] / seconds / flops_peak if entry["flops"] else None,
                entry["bytes"] / seconds / 1e9 if entry["bytes"] else None,
                contender["peak_bytes"] / 1e9,
                ratio[name],
                contender["parity_error"],
            )
        )
    return sorted(found, key=lambda row: row.seconds)


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _entry(entry: Record, flops_peak: float) -> Iterator[str]:
    yield f"### {entry.get('contest', entry['title'])}"
    yield ""
    if "batch" in entry and entry["batch"] != entry["planned_batch"]:
        yield f"Batch {entry['batch']}: {entry['planned_batch']} did not fit in memory."
        yield ""
    timed = rows(entry, flops_peak)
    if timed:
        yield "| | median, ms | host, ms | images/s | MFU | GB/s | peak GB | ratio | parity error |"
        yield "|---|---|---|---|---|---|---|---|---|"
    for row in timed:
        cells = [
            f"**{row.contender}**" if row.contender.startswith("fastvitc") else row.contender,
            f"{1e3 * row.seconds:.3f}",
            f"{1e3 * row.host_seconds:.3f}",
            f"{row.images_per_second:,.0f}",
            _cell(row.mfu, ".1%"),
            _cell(row.gigabytes_per_second, ",.0f"),
            f"{row.peak_gigabytes:.2f}",
            _cell(row.ratio, ".2f"),
            f"{row.parity_error:.1e}",
        ]
        yield f"| {' | '.join(cells)} |"
    if timed:
        yield ""
    if entry["state"] != "measured":
        yield f"- not measured: {entry['reason']}"
    for name, contender in entry.get("contenders", {}).items():
        if contender["state"] != "measured":
            yield f"- {name}: {contender['state']}: {contender['reason']}"


def _tests(record: Record) -> Iterator[str]:
    yield "### kernel tests"
    yield ""
    if record["state"] == "measured":
        yield f"{record['passed']} passed, {record['failed']} failed, {record['skipped']} skipped"
    if record["state"] != "measured" or record["reason"]:
        yield f"{record['state']}: {record['reason'] or 'no test was run; the output is in results.json'}"
    for failure in record.get("failures", ()):
        lines = failure["message"].strip().splitlines()
        yield f"- {failure['name']}: {lines[-1] if lines else ''}"


def table(results: Record) -> str:
    """The report in Markdown."""
    machine = results["machine"]
    lines = [
        f"# {results['label']}",
        "",
        f"Machine: {machine['device']}; driver and clocks: {machine['nvidia_smi'] or 'nvidia-smi does not answer'}.",
        ", ".join(f"{name} {version}" for name, version in machine["versions"].items()) + ".",
        f"{results['settings']}",
        f"MFU: of {machine['flops_peak'] / 1e12:.4g}e12 FLOP/s ({machine['flops_peak_source']}). GB/s: the least bytes "
        f"that the call must move over its time; a large copy moves {machine['copy_peak'] / 1e9:,.0f}.",
        "Host: until the call is handed to an idle device; a median near it is bound by launches.",
        "Ratio: the best peer's time over this one's, median over alternating passes; above 1 is faster.",
        "",
        *_tests(results["kernel_tests"]),
    ]
    for entry in results["entries"]:
        lines += ["", *_entry(entry, machine["flops_peak"])]
    return "\n".join(lines) + "\n"
