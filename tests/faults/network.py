"""Two processes of a run on two machines: network namespaces that a cable joins."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from .compare import unlike_runs
from .kills import STEPS
from .place import Place
from .ranks import rank_environment, seconds_until_none_lives
from .row import NotRun, Outcome
from .run import Run

_ADDRESSES = ("10.231.17.1", "10.231.17.2")
_LIMIT = 30.0  # seconds
_DOWN = 2.0  # seconds; shorter than what TCP bears
_PATIENCE = 90.0  # seconds to look at a run whose link stays down


def peer_killed(place: Place, trials: int) -> Outcome:
    """Kill the process on the other machine."""
    longest, failures = 0.0, []
    for trial in range(trials):
        place.say(f"{trial + 1} of {trials}")
        with _two_machines() as machines, _started(place, machines, place.options(epochs=50)) as (_, runs):
            killed, other = runs if trial % 2 else reversed(runs)
            runs[0].wait_for_step(STEPS // 2)
            killed.signal(signal.SIGKILL)
            longest = max(longest, seconds_until_none_lives({other.pid}))
            if longest > _LIMIT:
                failures.append(f"the other process lives {longest:.0f} s later")
            elif wrong := other.one_line():
                failures.append(wrong)
    return Outcome(trials, f"longest time until the other ended: {longest:.1f} s", tuple(failures))


def link_down(place: Place, trials: int) -> Outcome:
    """Take the link down for some seconds; in the full mode once for good, to tell what happens."""
    args, failures = place.options(), []
    for trial in range(trials):
        place.say(f"{trial + 1} of {trials}")
        with _two_machines() as machines:
            folders = []
            for down in (False, True):
                with _started(place, machines, args) as (folder, runs):
                    runs[0].wait_for_step(STEPS // 2)
                    if down:
                        _link(machines[trial % 2], "down")
                        time.sleep(_DOWN)
                        _link(machines[trial % 2], "up")
                    codes = [run.wait() for run in runs]
                folders.append(folder)
                if codes != [0, 0]:
                    failures.append(f"the processes ended with {codes}: {runs[0].errors[-500:]}")
        failures += [f"{part} differs" for part in unlike_runs(*folders)[:5]] if not failures else []
    found = f"down for {_DOWN:g} s: the run went on and ended as the undisturbed one"
    if not place.warm:
        found += f"; down for good: {_down_for_good(place)}"
    return Outcome(trials, found, tuple(failures))


def _down_for_good(place: Place) -> str:
    with _two_machines() as machines, _started(place, machines, place.options(epochs=50)) as (_, runs):
        runs[0].wait_for_step(STEPS // 2)
        _link(machines[0], "down")
        begun = time.monotonic()
        while all(run.code is None for run in runs) and time.monotonic() < begun + _PATIENCE:
            time.sleep(0.1)
        if all(run.code is None for run in runs):
            return f"both processes still wait after {_PATIENCE:g} s"
        return f"the first process ended after {time.monotonic() - begun:.0f} s: {[run.code for run in runs]}"


@contextmanager
def _two_machines() -> Iterator[tuple[str, str]]:
    """The names of two network namespaces that a pair of virtual devices joins."""
    names = f"faults-{os.getpid()}-a", f"faults-{os.getpid()}-b"
    try:
        try:
            for name in names:
                _ip("netns", "add", name)
            a, b = names
            _ip("-n", a, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", b)
            for name, address in zip(names, _ADDRESSES, strict=True):
                _ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
                _ip("-n", name, "link", "set", "lo", "up")
                _link(name, "up")
        except (OSError, subprocess.CalledProcessError) as error:
            raise NotRun(
                f"networks cannot be made here: {getattr(error, 'stderr', None) or error}"
            ) from error
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@contextmanager
def _started(place: Place, machines: tuple[str, str], args: list[str]):
    """A run of two processes, one on each machine: its folder and the processes."""
    folder = place.path("run")
    with ExitStack() as stack:
        runs: list[Run] = []
        for rank, machine in enumerate(machines):
            env = {**rank_environment(rank, _ADDRESSES[0], 29500), "GLOO_SOCKET_IFNAME": "cable"}
            runs.append(stack.enter_context(place.start([*args, "-o", str(folder)], env, network=machine)))
        yield folder, runs


def _link(machine: str, state: str) -> None:
    _ip("-n", machine, "link", "set", "cable", state)


def _ip(*args: str) -> None:
    subprocess.run(["ip", *args], capture_output=True, text=True, check=True)
