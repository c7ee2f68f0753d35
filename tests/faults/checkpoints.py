"""States that are damaged, and one that means harm."""

import os
import pickle
import random
import shutil
import zipfile
from pathlib import Path

import torch

from fastvitc.training.state import RunState, newest_state, state_files

from .compare import differences
from .place import Place
from .row import Outcome


def damaged(place: Place, trials: int) -> Outcome:
    """Cut the newest state at random lengths, and flip random bits in it; then both states at once."""
    whole = place.finished(place.options())
    newest, before = (RunState.load(file) for file in state_files(whole))
    contents, found = state_files(whole)[0].read_bytes(), random.Random(0)
    counts, failures = {"refused": 0, "the same": 0}, []
    for trial in range(trials):
        for kind in ("cut", "flipped"):
            folder = shutil.copytree(whole, place.path("run"))
            what = _damage(state_files(folder)[0], contents, kind, found)
            state = newest_state(folder, lambda warning: None)[1]
            if not differences(before, state):
                counts["refused"] += 1
            elif kind == "flipped" and not differences(newest, state):
                counts["the same"] += 1  # a bit that says nothing about the state, as a file's time
            else:
                failures.append(f"a state that is {what} was loaded as another one")
            shutil.rmtree(folder)
        place.say(f"{trial + 1} of {trials}")
    failures += _resumes_from_the_one_before(place, whole, contents)
    failures += _refuses_two(place, whole)
    return Outcome(
        2 * trials,
        f"{counts['refused']} were refused and the one before taken, {counts['the same']} loaded and were the same "
        "bit for bit",
        tuple(failures),
    )


def _damage(file: Path, contents: bytes, kind: str, found: random.Random) -> str:
    place = found.randrange(len(contents))
    if kind == "cut":
        file.write_bytes(contents[:place])
        return f"cut at byte {place}"
    bit = found.randrange(8)
    file.write_bytes(contents[:place] + bytes([contents[place] ^ 1 << bit]) + contents[place + 1 :])
    return f"flipped in bit {bit} of byte {place}"


def _resumes_from_the_one_before(place: Place, whole: Path, contents: bytes) -> list[str]:
    folder = shutil.copytree(whole, place.path("run"))
    state_files(folder)[0].write_bytes(contents[: len(contents) // 2])
    with place.start(["--resume", str(folder)]) as run:
        run.wait()
    told = "The one before it is taken" in run.text + run.errors
    same = run.code == 0 and not differences(
        RunState.load(state_files(whole)[0]), RunState.load(state_files(folder)[0])
    )
    return (
        [] if told and same else [f"the run from the state before ended with {run.code}: {run.errors[-500:]}"]
    )


def _refuses_two(place: Place, whole: Path) -> list[str]:
    folder = shutil.copytree(whole, place.path("run"))
    for file in state_files(folder):
        file.write_bytes(b"")
    with place.start(["--resume", str(folder)]) as run:
        run.wait()
    return [line for line in [run.one_line(), run.code != 1 and f"exit code {run.code}, not 1"] if line]


class _Harm:
    """What a pickle can do when it is loaded: here it makes a file."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self._mark),)


def malicious(place: Place, trials: int) -> Outcome:
    """Resume from pickles that run code, in each form that PyTorch reads."""
    failures, mark = [], place.path("executed")
    forms = [_as_saved, _as_plain_pickle, _as_old_format][:trials]
    pickle.loads(pickle.dumps(_Harm(mark)))
    if not mark.is_dir():
        failures.append("the pickle does no harm, so this row shows nothing")
    else:
        mark.rmdir()
    for form in forms:
        folder = place.path("run")
        file = folder / "checkpoints" / "epoch-00001-step-00000000.pt"
        file.parent.mkdir(parents=True)
        form(_Harm(mark), file)
        with place.start(["--resume", str(folder)]) as run:
            run.wait()
        if mark.exists():
            failures.append(f"{form.__name__}: its code was executed")
        failures += [
            line for line in [run.one_line(), run.code != 1 and f"exit code {run.code}, not 1"] if line
        ]
    return Outcome(len(forms), "each was refused with one line, and nothing was executed", tuple(failures))


def _as_saved(harm: _Harm, file: Path) -> None:
    torch.save({"format": harm, "model": {}}, file)
    assert zipfile.is_zipfile(file)


def _as_plain_pickle(harm: _Harm, file: Path) -> None:
    file.write_bytes(pickle.dumps(harm))


def _as_old_format(harm: _Harm, file: Path) -> None:
    torch.save({"format": harm}, file, _use_new_zipfile_serialization=False)
