"""Files that are whole or not there, and the folder for what can be made again."""

import os
from collections.abc import Callable
from pathlib import Path


def cache_folder() -> Path:
    """`$FASTVITC_CACHE`, else `$XDG_CACHE_HOME/fastvitc`, else `~/.cache/fastvitc`; it need not exist yet."""
    own, shared = os.environ.get("FASTVITC_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own)
    return (Path(shared) if shared else Path.home() / ".cache") / "fastvitc"


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary sibling, force it to disk, and rename it over `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        _force_to_disk(temporary)
        temporary.replace(path)
        _force_to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _force_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
