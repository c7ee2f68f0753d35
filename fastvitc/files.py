"""Files that are whole or not there, and the folder for what can be made again."""

import errno
import fcntl
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_UNFINISHED = ".unfinished"


def cache_folder() -> Path:
    """`$FASTVITC_CACHE`, else `$XDG_CACHE_HOME/fastvitc`, else `~/.cache/fastvitc`; it need not exist yet."""
    own, shared = os.environ.get("FASTVITC_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own)
    return (Path(shared) if shared else Path.home() / ".cache") / "fastvitc"


def private_folder(folder: Path) -> Path:
    """A folder below the cache that only this user can write to; it is made where it is missing.

    What is loaded from the cache runs as this user, so it must be nobody else's.

    Raises:
        OSError: it cannot be made, or others could have put something there.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_private(folder)
    return folder


def check_private(path: Path) -> None:
    """Raise PermissionError for a file or folder that another user owns, or may write to."""
    status = path.stat()
    if status.st_uid != os.geteuid():
        raise PermissionError(errno.EACCES, f"{path} belongs to another user", str(path))
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(
            errno.EACCES, f"others may write to {path}: chmod go-w takes that away", str(path)
        )


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file that other processes wait for. The system lets go of it when this process ends."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A private folder on this machine, in `$TMPDIR` or where else temporary files are kept, that goes at the end.

    Those that killed processes left go at the beginning.
    """
    place = private_folder(Path(tempfile.gettempdir(), f"fastvitc-{os.geteuid()}"))
    with locked(place / "lock"):
        for left in place.iterdir():
            if left.is_dir():
                _remove_abandoned(left)
        folder = Path(tempfile.mkdtemp(dir=place))
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX)  # until this process ends, however it does
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
        os.close(handle)


def _remove_abandoned(folder: Path) -> None:
    """Remove a folder that no process holds."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        pass
    finally:
        os.close(handle)


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
    """Remove what writers that were killed left in a folder; nobody else may be writing there."""
    for left in folder.glob(f".*{_UNFINISHED}"):
        left.unlink(missing_ok=True)


def _force_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
