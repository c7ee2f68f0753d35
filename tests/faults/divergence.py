"""Numbers that are not finite."""

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from fastvitc.training.state import RunState, state_files

from .place import Place
from .row import Outcome

#: What spoils the weights at once, and what spoils them within some steps.
_SPOILING = [["--lr", "1e39"], ["--lr", "1e4"], ["--lr", "1e39", "--model-ema"]]


def diverged(place: Place, trials: int) -> Outcome:
    """Train with learning rates far too high, from a start that is well, and look at all that is kept."""
    failures, states = [], 0
    for trial in range(trials):
        place.say(f"{trial + 1} of {trials}")
        folder = place.path("run")
        options = ["--opt", "sgd", "--warmup-epochs", "0", "--save-every", "1", "--seed", str(trial)]
        args = [*place.options(), *options, *_SPOILING[trial % len(_SPOILING)], "-o", str(folder)]
        with place.start(args) as run:
            if run.wait() != 1:
                failures.append(f"exit code {run.code}, not 1")
            failures += [line for line in [run.one_line()] if line]
        for file in state_files(folder):
            states += 1
            failures += _spoilt(file)
        model = folder / "last" / "model.safetensors"
        failures += (
            [f"last: {name}" for name, t in load_file(model).items() if not _finite(t)]
            if model.exists()
            else []
        )
    return Outcome(
        trials, f"each ended with 1 and one line; {states} states were kept, all finite", tuple(failures)
    )


def _spoilt(file: Path) -> list[str]:
    state = RunState.load(file)
    held = [state.model, state.ema or {}, *(entry for o in state.optimizers for entry in o["state"].values())]
    named = [(name, value) for values in held for name, value in values.items()]
    return [
        f"{file.name}: {name}" for name, value in named if isinstance(value, Tensor) and not _finite(value)
    ]


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())
