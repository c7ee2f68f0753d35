"""Runs one row in a process of its own: `python -m tests.faults.one NAME TRIALS FOLDER RESULT`."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from .place import ROOT, Place
from .row import NotRun, Outcome, Row
from .saves import shim
from .table import ROWS

#: The rights to mount and to make networks, for a user who has none; /run is where `ip netns` notes its names.
_OWN_RIGHTS = ["unshare", "-rmn", "sh", "-c", 'mount -t tmpfs run /run && exec "$@"', "sh"]


def in_own_process(row: Row, trials: int, folder: Path, *, warm: bool, quiet: bool) -> Outcome | str:
    """What a row found, or why it was not run."""
    folder.mkdir(parents=True, exist_ok=True)
    result = folder / f"{row.name}.json"
    result.unlink(missing_ok=True)
    options = [*(["--warm"] if warm else []), *(["--quiet"] if quiet else [])]
    command = [
        sys.executable,
        "-m",
        "tests.faults.one",
        row.name,
        str(trials),
        str(folder),
        str(result),
        *options,
    ]
    if row.mounts and os.geteuid() != 0:
        command = [*_OWN_RIGHTS, *command]
    done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False)
    if not result.exists():
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        if command[0] == "unshare" and "Traceback" not in done.stderr:
            return f"no rights to mount or to make networks: {last}"
        return Outcome(0, "the row itself failed", (done.stderr[-1500:],))
    found = json.loads(result.read_text())
    return found if isinstance(found, str) else Outcome(**found)


def _main(args: Sequence[str]) -> None:
    name, trials, folder, result = args[:4]
    shared = Path(folder) / "shared"
    place = Place(Path(folder) / name, shared, "--warm" in args, quiet="--quiet" in args, name=name)
    place.preload = shim(shared)
    try:
        found = asdict(ROWS[name].check(place, int(trials)))
    except NotRun as reason:
        found = str(reason)
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    _main(sys.argv[1:])
