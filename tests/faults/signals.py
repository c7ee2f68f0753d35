"""Signals of a scheduler and of a person: how soon the run ends, and what it leaves."""

import re
import signal
import time

from .compare import newest
from .kills import STEPS, steps_saved
from .place import Place
from .row import Outcome
from .run import Run

_CODES = {signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGINT: 130}
_LIMIT = 10.0  # seconds; a step, a save and the end of the program


def stopped(place: Place, trials: int) -> Outcome:
    """Send each signal so many times within an epoch."""
    longest, failures = dict.fromkeys(_CODES, 0.0), []
    for trial in range(trials):
        for number, code in _CODES.items():
            place.say(f"{number.name} {trial + 1} of {trials}")
            folder = place.path("run")
            with place.start([*place.options(), "-o", str(folder)]) as run:
                run.wait_for(f"  step {2 + trial % (STEPS - 3)}/{STEPS}: ")
                told = run.steps()
                seconds = _seconds_to_end(run, number)
                longest[number] = max(longest[number], seconds)
                failures += [f"{number.name}: {failure}" for failure in _wrong(run, code, seconds)]
            state = newest(folder)
            where = f"stopped by {number.name}; epoch {state.epoch + 1}, step {state.step} is saved; "
            if where not in run.errors or steps_saved(folder) < told:
                failures.append(
                    f"{number.name}: saved is epoch {state.epoch + 1}, step {state.step}: {run.errors}"
                )
    words = ", ".join(f"{number.name} {seconds:.1f} s" for number, seconds in longest.items())
    return Outcome(
        trials * len(_CODES), f"longest time to the end: {words} (limit {_LIMIT:g} s)", tuple(failures)
    )


def second_interrupt(place: Place, trials: int) -> Outcome:
    """Send Ctrl-C twice within one long step."""
    longest, failures = 0.0, []
    step = ["--batch-size", "160", "--image-size", "96", "--epochs", "9"]
    for trial in range(trials):
        place.say(f"{trial + 1} of {trials}")
        with place.start([*place.options(), *step, "-o", str(place.path("run"))]) as run:
            run.wait_for("first step")
            first = float(re.search(r"compilation included: ([\d.]+) s", run.text)[1])
            run.signal(signal.SIGINT)
            time.sleep(0.2)
            seconds = _seconds_to_end(run, signal.SIGINT)
            longest = max(longest, seconds)
            failures += _wrong(run, 130, seconds)
            if "is saved" in run.errors:
                failures.append(
                    f"the run had ended in the ordinary way; a step takes {first} s: {run.errors}"
                )
    return Outcome(trials, f"longest time to the end: {longest:.1f} s (limit {_LIMIT:g} s)", tuple(failures))


def _seconds_to_end(run: Run, number: int) -> float:
    begun = time.monotonic()
    run.signal(number)
    run.wait()
    return time.monotonic() - begun


def _wrong(run: Run, code: int, seconds: float) -> list[str]:
    found = [] if run.code == code else [f"exit code {run.code}, not {code}"]
    found += [line for line in [run.one_line()] if line]
    return found + ([f"{seconds:.1f} s to the end"] if seconds > _LIMIT else [])
