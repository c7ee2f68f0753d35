"""Kills at random times, as of a scheduler, a power cut, or the system where memory runs out."""

import random
import signal
import time
from pathlib import Path

from fastvitc import load_model
from fastvitc.errors import CheckpointError
from fastvitc.training.state import RunState, state_files

from .compare import newest, unlike_runs
from .place import Place
from .row import Outcome
from .run import Run

EVERY = 3
STEPS = 10  # of an epoch
#: A thread writes a state beside the training, while one more may wait for it: three intervals are under way at most.
_MOST_LOST = 3 * EVERY
_AT_THE_START = (
    0.25  # share of the kills that come at any time from the start, rather than after the first step
)
_SHARE_OF_THE_STEPS = (
    0.5  # of a whole run's time is the longest that a start may go on: most are killed on the way
)
_PAUSE = 0.002
FINISHED = "nothing is left to do"


def sigkill(place: Place, trials: int) -> Outcome:
    """Kill a run and start it again, at random times."""
    args = [*place.options(), "--save-every", str(EVERY)]
    whole, spans = _undisturbed(place, args)
    times, finds = random.Random(0), _Finds()
    folder = place.path("run")
    while finds.kills < trials:
        place.say(f"kill {finds.kills + 1} of {trials}")
        if _one_kill(place, [*args, "-o", str(folder), "--resume", "auto"], folder, spans, times, finds):
            finds.finished(whole, folder)
            folder = place.path("run")
    if steps_saved(folder):
        _to_the_end(place, [*args, "-o", str(folder), "--resume", "auto"], finds)
        finds.finished(whole, folder)
    return Outcome(finds.kills, finds.words(), tuple(finds.failures))


class _Finds:
    def __init__(self) -> None:
        self.kills = self.starting = self.saving = self.lost = self.ended = 0
        self.left: set[Path] = set()
        self.nothing_left = False
        self.failures: list[str] = []

    def words(self) -> str:
        return (
            f"{self.starting} before the first step, {self.saving} while it wrote a file; "
            f"at most {self.lost} steps lost (limit {_MOST_LOST}, saved every {EVERY}); "
            f"{self.ended} of {self.ended} runs ended as the undisturbed one"
        )

    def finished(self, whole: Path, folder: Path) -> None:
        """A run came to its end."""
        self.ended += 1
        if found := unlike_runs(whole, folder):
            self.failures.append(f"a run ended with other values than the undisturbed one: {found[:5]}")
        left = unfinished(folder)
        if self.nothing_left:  # nothing was begun that could have removed them
            left -= self.left
        if left:
            self.failures.append(f"unfinished files are left at the end: {sorted(map(str, left))}")
        self.left, self.nothing_left = set(), False

    def ended_by_itself(self, run: Run) -> None:
        """A run was not killed. One that was killed after its last state was saved had nothing left to do."""
        self.nothing_left = FINISHED in run.text
        if run.code != 0:
            self.failures.append(f"a start ended with {run.code}: {run.errors[-500:]}")

    def killed(self, run: Run, folder: Path, before: int) -> None:
        """A run was killed; `before` steps had been saved when it started."""
        self.kills += 1
        self.failures += unloadable(folder)
        saved = steps_saved(folder)
        told = run.steps()
        self.starting += "first step" not in run.text
        self.lost = max(self.lost, (told or before) - saved)
        if self.lost > _MOST_LOST:
            self.failures.append(f"{told} steps were done and {saved} saved")
        if saved < before:
            self.failures.append(f"{before} steps were saved at the start and {saved} at the kill")
        left = unfinished(folder)
        if "output: " in run.text and (old := self.left & left):
            self.failures.append(f"the start left what another had not finished: {sorted(map(str, old))}")
        self.saving += bool(left - self.left)
        self.left = left


def _undisturbed(place: Place, args: list[str]) -> tuple[Path, tuple[float, float]]:
    """The folder of a run that nothing disturbs, and its seconds before and from its first step."""
    folder, begun = place.path("undisturbed"), time.monotonic()
    with place.start([*args, "-o", str(folder)]) as run:
        run.wait_for("first step")
        stepping = time.monotonic()
        if run.wait() != 0:
            raise RuntimeError(f"an undisturbed run ended with {run.code}: {run.errors[-2000:]}")
    return folder, (stepping - begun, time.monotonic() - stepping)


def _one_kill(
    place: Place,
    args: list[str],
    folder: Path,
    spans: tuple[float, float],
    times: random.Random,
    finds: _Finds,
) -> bool:
    """Start the run and kill it; whether it came to its end before."""
    before = steps_saved(folder)
    starting = times.random() < _AT_THE_START
    after = times.uniform(0, spans[0] if starting else _SHARE_OF_THE_STEPS * spans[1])
    begun = time.monotonic()
    with place.start(args) as run:
        while run.code is None and not starting and "first step" not in run.text:
            time.sleep(_PAUSE)
            begun = time.monotonic()
        while run.code is None and time.monotonic() < begun + after:
            time.sleep(_PAUSE)
        if run.code is None:
            run.signal(signal.SIGKILL)
        if run.wait() == -signal.SIGKILL:
            finds.killed(run, folder, before)
            return False
        finds.ended_by_itself(run)
        return True


def _to_the_end(place: Place, args: list[str], finds: _Finds) -> None:
    with place.start(args) as run:
        run.wait()
        finds.ended_by_itself(run)


def unloadable(folder: Path) -> list[str]:
    """The states and models of a run's folder that cannot be loaded."""
    failures = []
    for file in state_files(folder):
        try:
            RunState.load(file)
        except CheckpointError as error:
            failures.append(f"a state cannot be loaded: {error}")
    for name in ("last", "best"):
        if (folder / name / "config.json").exists():
            try:
                load_model(folder / name)
            except CheckpointError as error:
                failures.append(f"a model cannot be loaded: {error}")
    return failures


def steps_saved(folder: Path) -> int:
    """The optimiser steps of a run's newest state, 0 where there is none."""
    if not state_files(folder):
        return 0
    state = newest(folder)
    return state.epoch * STEPS + state.step


def unfinished(folder: Path) -> set[Path]:
    """What writers that were killed left below a folder."""
    return {path.relative_to(folder) for path in folder.glob("**/.*") if path.name != ".lock"}
