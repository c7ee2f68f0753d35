"""Files that are whole or not there, and the folder for what can be made again."""

import os
import secrets
from collections.abc import Callable
from pathlib import Path

_UNFINISHED = ".unfinished"


def cache_folder() -> Path:
    """`$FASTVITC_CACHE`, else `$XDG_CACHE_HOME/fastvitc`, else `~/.cache/fastvitc`; it need not exist yet."""
    own, shared = os.environ.get("FASTVITC_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own)
    return (Path(shared) if shared else Path.home() / ".cache") / "fastvitc"


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary sibling, force it to disk, and rename it over `path`.

    The sibling's name is random and its file is new, so that writers on several machines never share one. What a killed
    writer left is removed by `remove_unfinished`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}{_UNFINISHED}")
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        write(temporary)
        _force_to_disk(temporary)
        temporary.replace(path)
        _force_to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Remove what writers that were killed left in a folder and below it; nobody else may be writing there."""
    for left in folder.rglob(f".*{_UNFINISHED}"):
        left.unlink(missing_ok=True)


def _force_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
