"""A kill inside each write, fsync and rename of a save."""

import os
import random
import shutil
import signal
import subprocess
from collections import Counter
from pathlib import Path

from fastvitc.training.state import RunState

from .compare import differences, newest, unlike_runs
from .kills import unfinished, unloadable
from .place import Place
from .row import NotRun, Outcome
from .run import Run

_SOURCE = Path(__file__).with_name("shim.c")
#: The end of epoch 2 of 3 saves the models, the state and, in the main thread, the summary.
_END = "checkpoints/epoch-00002-step-00000000.pt"
#: Thread, number among its calls, what is called on what.
_Call = tuple[str, int, str]
_LAST = {"main": "rename run/summary.csv", "other": f"rename run/{_END}"}


def shim(folder: Path) -> Path | None:
    """The library that kills inside a call, built into a folder; None where there is no C compiler."""
    compiler, library = shutil.which("cc"), folder / "shim.so"
    if compiler is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    built = folder / f"shim-{os.getpid()}.so"
    command = [compiler, "-O1", "-Wall", "-shared", "-fPIC", "-o", built, _SOURCE, "-ldl"]
    subprocess.run([*map(str, command)], check=True)
    built.rename(library)
    return library


def save_kill(place: Place, trials: int) -> Outcome:
    """Kill a run inside the calls that save the end of an epoch, and start it again."""
    if place.preload is None:
        raise NotRun("there is no C compiler (cc)")
    args = place.options()
    whole = place.finished(args)
    before = _stopped_in_the_second_epoch(place, args)
    old, (calls, new) = newest(before), _calls_of_the_save(place, args, before)
    chosen = calls if trials >= len(calls) else _spread(calls, trials)
    failures, taken = [], Counter()
    for number, (thread, at, call) in enumerate(chosen, 1):
        place.say(f"kill {number} of {len(chosen)}, in {call}")
        folder = _copy(place, before)
        with _resumed(place, args, folder, FAULTS_THREAD=thread, FAULTS_AT=str(at)) as run:
            if run.wait() != -signal.SIGKILL:
                failures.append(f"call {at} of the thread {thread} did not come again: {run.errors[-300:]}")
                continue
        failures += [f"after a kill in {call}: {failure}" for failure in unloadable(folder)]
        found = newest(folder)
        which = next(
            (name for name, state in (("old", old), ("new", new)) if not differences(state, found)), None
        )
        taken[which] += 1
        if which is None:
            failures.append(f"after a kill in {call} the newest state is neither the old nor the new one")
        with _resumed(place, args, folder) as run:
            if run.wait() != 0:
                failures.append(
                    f"after a kill in {call} the next start ended with {run.code}: {run.errors[-500:]}"
                )
                continue
        failures += [
            f"after a kill in {call}: {part} differs at the end" for part in unlike_runs(whole, folder)
        ]
        failures += [f"after a kill in {call}: {path} is left" for path in unfinished(folder)]
        shutil.rmtree(folder)
    kinds = Counter(call.split()[0] for _, _, call in chosen)
    words = ", ".join(f"{count} in a {kind}" for kind, count in sorted(kinds.items()))
    return Outcome(
        len(chosen),
        f"{words} of {len(calls)} calls; the newest whole state was {taken['old']} times the old one, "
        f"{taken['new']} times the new one",
        tuple(failures),
    )


def _stopped_in_the_second_epoch(place: Place, args: list[str]) -> Path:
    folder = place.path("stopped")
    with place.start([*args, "-o", str(folder)]) as run:
        run.wait_for("epoch 1/3: ")
        run.signal(signal.SIGTERM)
        if run.wait() != 75 or newest(folder).epoch != 1:
            raise RuntimeError(
                f"the run was not stopped in its second epoch: {run.text[-500:]}{run.errors[-500:]}"
            )
    return folder


def _calls_of_the_save(place: Place, args: list[str], before: Path) -> tuple[list[_Call], RunState]:
    """The calls of each thread until the end of the second epoch is saved; that state."""
    folder, listed = _copy(place, before), place.path("calls")
    with _resumed(place, args, folder, FAULTS_LIST=str(listed)) as run:
        run.wait()
    found: list[_Call] = []
    for thread, last in _LAST.items():
        lines = listed.read_text().replace(str(folder), "run").splitlines()
        calls = [line.removeprefix(f"{thread} ") for line in lines if line.startswith(thread)]
        # The folder's fsync comes last. The summary was also written at the start.
        ends = [number for number, call in enumerate(calls, 1) if call == last]
        found += [
            (thread, number, call) for number, call in enumerate(calls[: ends[thread == "main"] + 1], 1)
        ]
    return found, RunState.load(folder / _END)


def _copy(place: Place, before: Path) -> Path:
    return shutil.copytree(before, place.path("run"))


def _resumed(place: Place, args: list[str], folder: Path, **env: str) -> Run:
    below = {"FAULTS_BELOW": str(folder)} if env else {}
    return place.start([*args, "-o", str(folder), "--resume", "auto"], {**below, **env})


def _spread(calls: list[_Call], count: int) -> list[_Call]:
    """Some calls, one of each kind at least."""
    order = random.Random(0).sample(calls, len(calls))
    kinds = {call.split()[0]: (thread, at, call) for thread, at, call in order}
    rest = [call for call in order if call not in kinds.values()]
    return [*kinds.values(), *rest][:count]
