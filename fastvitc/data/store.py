"""The files of an index: a few arrays for each split, written a class at a time and mapped by all who read them."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastvitc.data.index import ImageIndex
from fastvitc.data.mapped import map_array
from fastvitc.data.names import Names
from fastvitc.data.source import PLACE, Files, Shards

_COLUMNS = {"labels": np.dtype("<i4"), "names": np.dtype("u1"), "ends": np.dtype("<i8"), "places": PLACE}


class IndexWriter:
    """Writes the index of a split into a folder.

    It keeps no name in memory. `add` the images in their order, then `finish`.
    """

    def __init__(self, folder: Path, split: str) -> None:
        self._folder, self._split = folder, split
        self._columns = {name: _column(folder, split, name).open("wb") for name in _COLUMNS}
        self._names, self._labels = hashlib.sha256(), hashlib.sha256()
        self._images = self._bytes = 0

    def __enter__(self) -> "IndexWriter":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._columns.values():
            file.close()

    def add(self, labels: np.ndarray, names: Sequence[str], places: np.ndarray | None = None) -> None:
        """Images that follow: their labels, names, and for shards their places."""
        encoded = [os.fsencode(name) for name in names]
        ends = self._bytes + np.cumsum([len(name) for name in encoded], dtype=np.int64)
        added = {"labels": labels, "ends": ends, "places": np.empty(0, PLACE) if places is None else places}
        for name, values in added.items():
            self._columns[name].write(values.astype(_COLUMNS[name]).tobytes())
        self._columns["names"].write(b"".join(encoded))
        self._labels.update(labels.astype(_COLUMNS["labels"]).tobytes())
        self._names.update(b"".join(name + b"\0" for name in encoded))
        self._images, self._bytes = self._images + len(encoded), self._bytes + sum(map(len, encoded))

    def finish(self, root: str, classes: Sequence[str], shards: Sequence[str] | None = None) -> None:
        """Say what the images have in common. The digest is of names and labels: the same images may be kept
        otherwise, or elsewhere."""
        parts = self._split, self._images, classes, self._names.hexdigest(), self._labels.hexdigest()
        common = {
            "root": root,
            "classes": classes,
            "shards": shards,
            "digest": hashlib.sha256(json.dumps(parts).encode()).hexdigest(),
        }
        _common(self._folder, self._split).write_text(json.dumps(common))


def read_columns(folder: Path, split: str) -> tuple[np.ndarray, Names, np.ndarray]:
    """(labels, names, places) that a writer has written, mapped."""
    columns = {name: map_array(_column(folder, split, name), dtype) for name, dtype in _COLUMNS.items()}
    return columns["labels"], Names(columns["names"], columns["ends"]), columns["places"]


def read_split(folder: Path, split: str) -> ImageIndex:
    """The index of a split that was written into a folder, which may go as soon as this has returned.

    Raises:
        OSError: its files cannot be opened.
    """
    common = json.loads(_common(folder, split).read_text())
    labels, names, places = read_columns(folder, split)
    shards, root = common["shards"], common["root"]
    source = Files(root, names) if shards is None else Shards(shards, names, places)
    return ImageIndex(split, root, tuple(common["classes"]), source, labels, common["digest"])


def _column(folder: Path, split: str, name: str) -> Path:
    return folder / f"{split}.{name}"


def _common(folder: Path, split: str) -> Path:
    return folder / f"{split}.json"
