"""A process of the program while it runs: what it said, its end, signals to it."""

import os
import re
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import Popen

_LIMIT = 240.0  # seconds; nothing here takes as long
_PAUSE = 0.005
_EPOCH = re.compile(r"epoch (\d+)/\d+: ")
_STEP = re.compile(r"  step (\d+)/(\d+): ")
_RESUMED = re.compile(r"resumed in epoch (\d+), (?:after step (\d+)|at its start)")
#: Our warnings, and what the libraries of DALI and PyTorch print by themselves.
_NOT_OURS = re.compile(r"warning: |.{0,9}\[ERROR\]|\[[WE]\d{4} ")


class Stuck(Exception):
    """A process did not come to where it should have been."""


class Run:
    """A process that leads a process group of its own, and the files with its output.

    As a context manager it leaves nothing of the group behind.
    """

    def __init__(self, process: Popen | BaseProcess, log: Path) -> None:
        self._process, self.log = process, log
        assert process.pid is not None
        self.pid: int = process.pid

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        if self.code is None:  # it may not lead its group yet
            self.signal(signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._wait(_LIMIT)

    @property
    def text(self) -> str:
        """What it printed so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    @property
    def errors(self) -> str:
        """What it printed on stderr."""
        file = self.log.with_name(self.log.name + ".err")
        return file.read_text(errors="replace") if file.exists() else ""

    @property
    def code(self) -> int | None:
        """Its exit code, or the signal that ended it as a negative number; None while it runs."""
        return self._process.poll() if isinstance(self._process, Popen) else self._process.exitcode

    def wait(self, seconds: float = _LIMIT) -> int:
        """Its exit code, when it has ended.

        Raises:
            Stuck: it has not within these seconds.
        """
        self._wait(seconds)
        if self.code is None:
            raise Stuck(f"still running after {seconds:g} s: {self.text[-500:]}{self.errors[-500:]}")
        return self.code

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self.code is None and time.monotonic() < end:
            time.sleep(_PAUSE)

    def wait_for(self, words: str, seconds: float = _LIMIT) -> None:
        """Wait until it has printed something.

        Raises:
            Stuck: it ended before, or did not within these seconds.
        """
        self._wait_until(lambda: words in self.text, repr(words), seconds)

    def wait_for_step(self, step: int) -> None:
        """Wait until it has told of an optimiser step or a later one, counted over all epochs; Stuck as above."""
        self._wait_until(lambda: (self.steps() or 0) >= step, f"step {step}", _LIMIT)

    def _wait_until(self, done: Callable[[], bool], what: str, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not done():
            if self.code is not None and not done():
                raise Stuck(f"ended with {self.code} before {what}: {self.text[-500:]}{self.errors[-500:]}")
            if time.monotonic() > end:
                raise Stuck(f"no {what} within {seconds:g} s: {self.text[-500:]}{self.errors[-500:]}")
            time.sleep(_PAUSE)

    def signal(self, number: int) -> None:
        """Send a signal to this process alone."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def steps(self) -> int | None:
        """How many optimiser steps the run is known to have done, by its log; None before it says so."""
        return steps_told(self.text)

    def one_line(self) -> str | None:
        """What is wrong with the error it printed; None for one line of the program's own, without a traceback."""
        lines = [line for line in self.errors.splitlines() if not _NOT_OURS.match(line)]
        if len(lines) == 1 and lines[0].startswith("fastvitc-train: "):
            return None
        return f"not one line on stderr: {self.errors[-1500:]!r}"


def steps_told(log: str) -> int | None:
    """The optimiser steps that a log tells of."""
    epochs, step, size = 0, None, 0
    for line in log.splitlines():
        if found := _RESUMED.match(line):
            epochs, step = int(found[1]) - 1, int(found[2] or 0)
        elif found := _EPOCH.match(line):
            epochs, step = int(found[1]), 0
        elif found := _STEP.match(line):
            step, size = int(found[1]), int(found[2])
    if step is None or not size:
        return None
    return epochs * size + step


def children(pid: int) -> list[int]:
    """The processes that a process has begun, and theirs."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:  # it has ended
                continue
            parents.setdefault(parent, []).append(int(entry.name))
    found = [*parents.get(pid, ())]
    for child in found:
        found += parents.get(child, ())
    return found


def lives(pid: int) -> bool:
    """Whether a process is there and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
