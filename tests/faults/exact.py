"""A run that is cut within an epoch and resumed equals the undisturbed one, in every way of running it."""

import signal
from itertools import product
from pathlib import Path

from .compare import newest, unlike_runs
from .kills import STEPS
from .place import Place
from .row import Outcome
from .run import Stuck

_COMPILED = {"eager": "--no-compile", "compiled": "--compile"}
_MORE = {
    "clean": [],
    "EMA, mixup, accumulation": [
        *("--model-ema", "--model-ema-rate", "0.3", "--mixup", "0.5", "--cutmix", "0.5"),
        *("--grad-accum-steps", "2"),
    ],
}
#: The first two are the quickest that differ in most: the tests take them.
_WAYS = [
    ("eager", "bf16", "pil", 1, "EMA, mixup, accumulation"),
    ("eager", "fp32", "dali", 1, "clean"),
]
_WAYS += [
    way for way in product(_COMPILED, ("fp32", "bf16"), ("pil", "dali"), (1, 2), _MORE) if way not in _WAYS
]
_TOO_LATE = 3  # a signal may come after an epoch's last step; then it is sent again


def exact(place: Place, trials: int) -> Outcome:
    """Stop a run in its second epoch by SIGTERM, resume it, and compare all of it with the undisturbed one."""
    failures, cuts = [], []
    for way in _WAYS[:trials]:
        compiled, precision, loader, ranks, more = way
        name = f"{compiled}, {precision}, {loader}, {ranks} ranks, {more}"
        place.say(name)
        batch = 16 // ranks // (2 if _MORE[more] else 1)  # so that an epoch has as many steps
        args = [
            *(option for option in place.options(batch=batch) if option != "--no-compile"),
            *(_COMPILED[compiled], "--precision", precision, "--loader", loader, *_MORE[more]),
        ]
        try:
            whole = place.finished(args, ranks=ranks)
            cuts.append(_cut_and_resumed(place, args, ranks, whole, name, failures))
        except (Stuck, RuntimeError) as error:
            failures.append(f"{name}: {error}")
    words = f"cut after {', '.join(map(str, sorted(set(cuts))))} of {STEPS} steps of an epoch"
    return Outcome(min(trials, len(_WAYS)), words, tuple(failures))


def _cut_and_resumed(
    place: Place, args: list[str], ranks: int, whole: Path, name: str, failures: list[str]
) -> int:
    """Steps of the second epoch that were done at the cut."""
    for _ in range(_TOO_LATE):
        folder = place.path("cut")
        command = [*args, "-o", str(folder)]
        with place.ranks(command) if ranks > 1 else place.start(command) as run:
            run.wait_for_step(STEPS + 3)
            run.signal(signal.SIGTERM)
            code = run.wait()
            if ranks == 1 and code != 75:  # torchrun has an exit code of its own
                failures.append(f"{name}: SIGTERM ended the run with {code}: {run.errors[-500:]}")
        cut = newest(folder)
        if cut.epoch == 1 and cut.step:
            break
    else:
        raise Stuck(f"the run was not cut in its second epoch, but after epoch {cut.epoch}, step {cut.step}")
    command = ["--resume", str(folder)]
    with place.ranks(command) if ranks > 1 else place.start(command) as run:
        if run.wait() != 0:
            raise Stuck(f"the resumed run ended with {run.code}: {run.errors[-1000:]}")
    failures += [f"{name}: {part} differs" for part in unlike_runs(whole, folder)[:5]]
    return cut.step
