"""Two processes of a run, of which one is lost."""

import os
import signal
import socket
import time
from contextlib import ExitStack
from pathlib import Path

from .compare import unlike_runs
from .kills import STEPS
from .place import Place
from .row import Outcome
from .run import Run, Stuck, children, lives

_LIMIT = 60.0  # seconds; torchrun gives its processes 30 after a signal


def rank_crash(place: Place, trials: int) -> Outcome:
    """Kill one of two processes within an epoch; in the full mode under torchrun, which then starts them again."""
    longest, failures = 0.0, []
    for trial in range(trials):
        place.say(f"{trial + 1} of {trials}")
        args = [*place.options(epochs=50), "-o", str(place.path("run"))]
        with ExitStack() as stack:
            runs = pair(place, args, stack) if place.warm else [stack.enter_context(place.ranks(args))]
            runs[0].wait_for_step(STEPS // 2 + trial % STEPS)
            everyone = {pid for run in runs for pid in (run.pid, *children(run.pid))}
            os.kill(_rank(runs, trial % 2), signal.SIGKILL)
            seconds = seconds_until_none_lives(everyone)
        longest = max(longest, seconds)
        if seconds > _LIMIT:
            failures.append(f"a process lives {seconds:.0f} s after another was killed")
    return Outcome(trials, f"longest time until every process had ended: {longest:.1f} s", tuple(failures))


def restarted(place: Place, trials: int) -> Outcome:
    """Kill one of two processes under `torchrun --max-restarts 2 ... --resume auto`, and compare the end."""
    args, failures = [*place.options(), "--save-every", "3"], []
    whole = place.finished(args, ranks=2)
    for trial in range(trials):
        place.say(f"{trial + 1} of {trials}")
        folder = place.path("run")
        with place.ranks([*args, "-o", str(folder), "--resume", "auto"], restarts=2) as run:
            try:
                run.wait_for_step(STEPS + trial % STEPS)
                os.kill(_rank([run], trial % 2), signal.SIGKILL)
                if run.wait() != 0:
                    failures.append(f"torchrun ended with {run.code}: {run.errors[-1000:]}")
                    continue
            except Stuck as stuck:
                failures.append(str(stuck))
                continue
        if "resumed in epoch" not in run.text:
            failures.append("the run was not resumed: the kill came too late")
        failures += [f"{part} differs" for part in unlike_runs(whole, folder)[:5]]
    return Outcome(trials, "the weights equal those of the undisturbed run", tuple(failures))


def pair(place: Place, args: list[str], stack: ExitStack) -> list[Run]:
    """Two processes of one run, begun without torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        stack.enter_context(place.start(args, rank_environment(rank, "127.0.0.1", port))) for rank in (0, 1)
    ]


def rank_environment(rank: int, address: str, port: int) -> dict[str, str]:
    """What torchrun tells one of two processes."""
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    return {**{k: str(v) for k, v in values.items()}, "MASTER_ADDR": address, "MASTER_PORT": str(port)}


def seconds_until_none_lives(pids: set[int]) -> float:
    """How long it takes until all processes have ended, at most a little more than the limit."""
    begun = time.monotonic()
    while any(map(lives, pids)) and time.monotonic() < begun + _LIMIT + 1:
        time.sleep(0.005)
    return time.monotonic() - begun


def _rank(runs: list[Run], rank: int) -> int:
    """The process of a rank."""
    if len(runs) == 2:
        return runs[rank].pid
    for pid in children(runs[0].pid):
        if f"RANK={rank}" in Path(f"/proc/{pid}/environ").read_text().split("\0"):
            return pid
    raise Stuck(f"torchrun has no process of rank {rank}")
