"""A cache folder in which somebody else could have put something."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from fastvitc.kernels.cpu import build

from .place import Place
from .row import NotRun, Outcome

_SOURCE = """
#include <stdlib.h>
#include <sys/stat.h>
__attribute__((constructor)) static void mark(void) { mkdir(getenv("FAULTS_MARK"), 0700); }
"""


def foreign_cache(place: Place, trials: int) -> Outcome:
    """Put a library that leaves a mark where the program looks for its kernels, in folders that others can write to."""
    if shutil.which("cc") is None or build.no_native("cpu") is not None:
        raise NotRun("the CPU kernels are not built here")
    name = build._key(build._compiler(), build._flags())
    failures = []
    if not _loads(place, name, lambda native: None):
        failures.append("the library in a folder of one's own was not loaded, so this row shows nothing")
    kinds = [kind for kind in _KINDS if os.geteuid() == 0 or "another" not in kind][:trials]
    for kind in kinds:
        place.say(kind)
        if _loads(place, name, _KINDS[kind]):
            failures.append(f"the library in {kind} was loaded")
    found = f"not loaded from {', '.join(kinds)}; loaded from a folder of one's own"
    return Outcome(len(kinds), found, tuple(failures))


def _loads(place: Place, name: str, change: Callable[[Path], None]) -> bool:
    """Whether a run loads the library."""
    cache, mark = place.path("cache"), place.path("loaded")
    native = cache / "native"
    native.mkdir(parents=True, mode=0o700)
    library = native / f"{name}.so"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-x", "c", "-o", library, "-"], input=_SOURCE, text=True, check=True
    )
    digest = subprocess.run(
        ["sha256sum", library], capture_output=True, text=True, check=True
    ).stdout.split()[0]
    library.with_suffix(".sha256").write_text(digest)
    library.chmod(0o600)
    library.with_suffix(".sha256").chmod(0o600)
    change(native)
    env = {"FASTVITC_CACHE": str(cache), "FAULTS_MARK": str(mark)}
    with place.start([*place.options(epochs=1), "-o", str(place.path("run"))], env) as run:
        run.wait()
    return mark.exists()


def _others_may_write(path: Path) -> None:
    path.chmod(path.stat().st_mode | 0o022)


_KINDS: dict[str, Callable[[Path], None]] = {
    "a folder that others may write to": _others_may_write,
    "another user's folder": lambda native: os.chown(native, 12345, 12345),
    "a file that others may write to": lambda native: [_others_may_write(file) for file in native.iterdir()],
    "another user's file": lambda native: [os.chown(file, 12345, 12345) for file in native.iterdir()],
}
