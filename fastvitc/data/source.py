"""Where images are kept: what an index reads them from."""

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np

from fastvitc.data.mapped import OpenFile
from fastvitc.data.names import Names

#: What the name of an image ends with.
EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
#: Where an image lies in tar shards.
PLACE = np.dtype([("shard", "<i4"), ("offset", "<i8"), ("size", "<i8")])
_OPEN_SHARDS = 128  # of a process; many systems allow 1024 open files


class Source(Protocol):
    """Images by their numbers from 0."""

    def read(self, number: int) -> bytes:
        """The bytes of the encoded image; OSError where they cannot be had."""

    def name(self, number: int) -> str:
        """The image's name, as messages give it."""


class Files:
    """Images that are files of their own, named below the folder `root`."""

    def __init__(self, root: str, names: Names | Sequence[str]) -> None:
        self._root, self._names = root, names

    def read(self, number: int) -> bytes:
        return Path(self.name(number)).read_bytes()

    def name(self, number: int) -> str:
        return os.path.join(self._root, self._names[number])


class Shards:
    """Images that are members of tar files.

    Args:
        shards: paths of the tar files.
        names: of the members.
        places: of type `PLACE`, shape (images,).
    """

    def __init__(self, shards: Sequence[str], names: Names, places: np.ndarray) -> None:
        self._shards, self._names, self._places = shards, names, places

    def read(self, number: int) -> bytes:
        shard, offset, size = self._places[number].item()
        file = _opened(self._shards[shard])
        data = os.pread(file.descriptor, size, offset)
        if len(data) < size:
            raise OSError("its shard has become shorter")
        return data

    def name(self, number: int) -> str:
        return f"{self._shards[self._places[number]['shard']]}:{self._names[number]}"


@lru_cache(_OPEN_SHARDS)
def _opened(path: str) -> OpenFile:
    """An open file; one that is dropped here while a thread reads from it stays open for that thread."""
    return OpenFile(os.open(path, os.O_RDONLY))
