"""What must not grow or come again over many epochs."""

import numpy as np

from .place import Place
from .row import Outcome
from .run import Run, children

_MOST_MEGABYTES = 1.0  # an epoch
_FEWEST = 9  # epochs that show a slope
_WARM_UP = 1 / 3  # share of the epochs


def memory(place: Place, epochs: int) -> Outcome:
    """Look at the resident memory of a run and its workers after each epoch."""
    epochs = max(epochs, _FEWEST)
    args = [*place.options(place.digits(10, 64, 16), epochs=epochs), "--workers", "2"]
    resident = []
    with place.start([*args, "-o", str(place.path("run"))]) as run:
        for epoch in range(1, epochs + 1):
            run.wait_for(f"epoch {epoch}/{epochs}: ")
            resident.append(_resident_megabytes(run))
        run.wait()
    if run.code != 0:
        return Outcome(epochs, "", (f"the run ended with {run.code}: {run.errors[-500:]}",))
    last = resident[int(_WARM_UP * epochs) : -1]  # after the last epoch the workers end
    slope = float(np.polyfit(range(len(last)), last, 1)[0])
    found = f"{slope:+.2f} MB an epoch from {last[0]:.0f} MB (limit {_MOST_MEGABYTES:g})"
    return Outcome(epochs, found, () if slope <= _MOST_MEGABYTES else ("the memory grows",))


def _resident_megabytes(run: Run) -> float:
    total = 0
    for pid in (run.pid, *children(run.pid)):
        try:
            with open(f"/proc/{pid}/status") as status:
                total += sum(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
        except OSError:  # it has ended
            continue
    return total / 1024


def recompiled(place: Place, epochs: int) -> Outcome:
    """Run compiled, with a last evaluation batch that is shorter, and look for the line that tells of a compilation."""
    args = [option for option in place.options(epochs=epochs) if option != "--no-compile"]
    with place.start([*args, "--compile", "-o", str(place.path("run"))]) as run:
        run.wait()
    failures = [line for line in run.text.splitlines() if "compiled anew" in line]
    if run.code != 0 or "first step, compilation included" not in run.text:
        failures.append(f"the run ended with {run.code}: {run.errors[-500:]}")
    return Outcome(epochs, f"{len(failures)} compilations after the first epoch", tuple(failures))
