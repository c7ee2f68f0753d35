"""Measures one contest: every contender's parity first, then times in alternating passes.

A contender's record has a `state`: "measured", with `times` (the median of each pass) and `peak_bytes`; "wrong" (its
result is off; it is not timed) or "raised", with the `reason`; or "not measured", with the `reason`.
"""

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from bench.contest import Arena, Contest, ParityError
from bench.gpu.stopwatch import Stopwatch

Record = dict[str, object]

OUT_OF_TIME = "out of time"


@dataclass(frozen=True)
class Patience:
    """`passes` alternate over the contenders; each calls one for about `seconds`, within the bounds of `calls`."""

    passes: int = 5
    seconds: float = 0.1
    calls: tuple[int, int] = (3, 50)


def not_measured(why: str) -> Record:
    return {"state": "not measured", "reason": why}


def reason(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]


def _failure(error: Exception) -> Record:
    return {"state": "wrong" if isinstance(error, ParityError) else "raised", "reason": reason(error)}


def measure(
    contest: Contest,
    names: Iterable[str],
    stopwatch: Stopwatch,
    patience: Patience,
    deadline: float,
    note: Callable[[dict[str, Record]], None] = lambda records: None,
) -> dict[str, Record]:
    """Name → record of each contender, in order; `note` gets them as they grow.

    `deadline` is of time.monotonic. A contender is begun if it will be ready in the first 85% of the time should it
    take as long as the longest of its kind; then passes are made, at least one.

    Raises:
        Exception: there is no truth to compare with, or an error has broken the device.
        torch.OutOfMemoryError: a contender needs more memory than there is.
    """
    records = {name: not_measured("not reached") for name in names}
    note(records)
    begin = time.monotonic()
    arena = Arena()
    arena.open(contest)
    ready: dict[str, tuple[Callable[[], object], int]] = {}
    latest, longest = begin + 0.85 * (deadline - begin), defaultdict(float)
    for name in records:
        started, kind = time.monotonic(), (name.startswith("fastvitc"), name.endswith(" compiled"))
        if name not in contest.contenders:
            records[name] = not_measured("does not run here")
        elif started + longest[kind] >= latest:
            records[name] = not_measured(OUT_OF_TIME)
        else:
            try:
                records[name], ready[name] = _prepared(arena, contest, name, stopwatch, patience)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                records[name] = _failure(error)
                note(records)
                stopwatch.allocated()  # raises where the error has broken the device
            longest[kind] = max(longest[kind], time.monotonic() - started)
        note(records)
    for number in range(patience.passes):
        if number and time.monotonic() >= deadline:
            break
        for name, (call, repeats) in list(ready.items()):
            try:
                seconds = statistics.median(stopwatch.seconds(call, repeats))
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                records[name] = _failure(error)
                del ready[name]
                note(records)
                stopwatch.allocated()
            else:
                records[name]["state"] = "measured"
                records[name]["times"].append(seconds)
        note(records)
    return records


def _prepared(
    arena: Arena, contest: Contest, name: str, stopwatch: Stopwatch, patience: Patience
) -> tuple[Record, tuple[Callable[[], object], int]]:
    """The record of a contender that is right and warm, and (its call, how often a pass makes it)."""
    before = stopwatch.allocated()
    started = time.monotonic()
    call, error = arena.enter(contest, name)
    call()
    held = stopwatch.allocated() - before
    ready_after = time.monotonic() - started
    peak = held + stopwatch.peak(call)
    least, most = patience.calls
    estimate = min(stopwatch.seconds(call, 2))
    repeats = min(most, max(least, math.ceil(patience.seconds / max(estimate, 1e-9))))
    record = {
        **not_measured("not reached"),
        "parity_error": error,
        "ready_after": ready_after,
        "host_seconds": min(stopwatch.host(call) for _ in range(2)),
        "peak_bytes": peak,
        "repeats": repeats,
        "times": [],
    }
    return record, (call, repeats)
