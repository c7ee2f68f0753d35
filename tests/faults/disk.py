"""A disk that is full, and one that cannot be written to."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastvitc.training.state import state_files

from .compare import unlike_runs
from .kills import unfinished, unloadable
from .place import Place
from .row import NotRun, Outcome

#: MB; a run needs some 24: two states, the next, and two models. The first states fit into the larger ones.
_SIZES = [15, 9, 20, 4, 11, 13, 17, 18, 19, 22]


def disk_full(place: Place, trials: int) -> Outcome:
    """Run into the end of a small disk, make space, and resume."""
    args = [*place.options(), "--save-every", "3"]
    whole = place.finished(args)
    failures, states = [], 0
    for size in _SIZES[:trials]:
        place.say(f"{size} MB")
        with _disk(place, f"size={size}m") as disk:
            command = [*args, "-o", str(disk / "run"), "--resume", "auto"]
            with place.start(command) as run:
                code = run.wait()
                failures += [f"{size} MB: {line}" for line in [run.one_line()] if line]
            if code != 1:
                failures.append(f"{size} MB: exit code {code}, not 1")
            states += bool(state_files(disk / "run"))
            failures += [f"{size} MB: {failure}" for failure in unloadable(disk / "run")]
            _mount("-o", "remount,size=64m", str(disk))
            with place.start(command) as run:
                if run.wait() != 0:
                    failures.append(
                        f"{size} MB: with more space it ended with {run.code}: {run.errors[-500:]}"
                    )
                    continue
            failures += [f"{size} MB: {part} differs" for part in unlike_runs(whole, disk / "run")[:5]]
            failures += [f"{size} MB: {path} is left" for path in unfinished(disk / "run")]
    found = f"each ended with 1 and one line, {states} with a state; with space made all ended as the undisturbed run"
    return Outcome(min(trials, len(_SIZES)), found, tuple(failures))


def read_only(place: Place, trials: int) -> Outcome:
    """Give a folder that cannot be written to: on a read-only disk, or below a file."""
    failures = []
    with _disk(place, "size=1m,ro") as disk:
        file = place.path("file")
        file.touch()
        outputs = [disk / "run", file / "run"][:trials]
        for output in outputs:
            with place.start([*place.options(), "-o", str(output)]) as run:
                if run.wait() != 1:
                    failures.append(f"exit code {run.code}, not 1")
                failures += [line for line in [run.one_line()] if line]
                if str(output) not in run.errors:
                    failures.append(f"the line does not name {output}: {run.errors}")
    return Outcome(len(outputs), "each ended with 1 and one line that names the folder", tuple(failures))


@contextmanager
def _disk(place: Place, options: str) -> Iterator[Path]:
    """A file system of its own in memory."""
    folder = place.path("disk")
    folder.mkdir()
    try:
        _mount("-t", "tmpfs", "-o", options, "tmpfs", str(folder))
    except (OSError, subprocess.CalledProcessError) as error:
        raise NotRun(
            f"file systems cannot be mounted here: {getattr(error, 'stderr', None) or error}"
        ) from error
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _mount(*args: str) -> None:
    subprocess.run(["mount", *args], capture_output=True, text=True, check=True)
