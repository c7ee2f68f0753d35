"""Arrays in files that processes share: their memory is the system's copy of the file, one for all of them."""

import mmap
import os
from multiprocessing.reduction import DupFd
from pathlib import Path

import numpy as np


class Mapped(np.ndarray):
    """A read-only array that lies in a file, which may be deleted at once.

    Pickled for a worker process it is the open file, not the content.
    """

    _file: "OpenFile | None" = None  # a part of the array has none

    def __reduce__(self):  # what numpy declares has no narrower type
        if self._file is None:
            return super().__reduce__()
        return _receive, (DupFd(self._file.descriptor), self.dtype)


def map_array(path: Path, dtype: np.dtype | type) -> np.ndarray:
    """The content of a file as an array of one dimension; OSError where the file cannot be opened."""
    return _map(os.open(path, os.O_RDONLY), np.dtype(dtype))


class OpenFile:
    """Closes a file when nothing refers to it any more."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


def _map(descriptor: int, dtype: np.dtype) -> np.ndarray:
    file = OpenFile(descriptor)
    if os.fstat(descriptor).st_size == 0:
        return np.empty(0, dtype)
    content = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    array = np.frombuffer(content, dtype).view(Mapped)
    array._file = file
    return array


def _receive(descriptor: DupFd, dtype: np.dtype) -> np.ndarray:
    return _map(descriptor.detach(), dtype)
