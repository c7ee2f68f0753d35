"""Millions of names in two arrays: as strings each process that touches them would end up with a copy of its own."""

import os

import numpy as np


class Names:
    """Names by number, a sequence of str.

    Args:
        content: uint8, the names one after another, as the file system encodes them.
        ends: whole numbers, shape (names,), where each ends in `content`.
    """

    def __init__(self, content: np.ndarray, ends: np.ndarray) -> None:
        self._content, self._ends = content, ends

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: int) -> str:
        start = self._ends[number - 1] if number else 0
        return os.fsdecode(self._content[start : self._ends[number]].tobytes())
