"""Which images there are. To a loader an image is a number: `ImageIndex.read(number)` gives its bytes.

For images that are kept otherwise than as files or in shards, write another `Source`.
"""

import errno
import hashlib
import os
import time
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fastvitc.data.source import Source
from fastvitc.errors import DataError

_PASSING = {errno.EAGAIN, errno.EINTR, errno.EIO, errno.ESTALE, errno.ETIMEDOUT}
_WAITS = (0.1, 1.0)  # seconds before a read is tried again


@dataclass(frozen=True, eq=False)
class ImageIndex:
    """The images of one split, ordered by class and name.

    Attributes:
        split: `"train"` or `"val"`.
        root: the folder that holds the images.
        classes: the classes' names; a label is a position in it.
        source: where the images are kept; None where they are made up, see `synthetic_index`.
        labels: whole numbers, shape (images,).
        known_digest: the `digest`, where it is known already.
    """

    split: str
    root: str
    classes: tuple[str, ...]
    source: Source | None
    labels: np.ndarray
    known_digest: str | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def digest(self) -> str:
        """A hash of the images' names and labels: another one means other images, or another order."""
        if self.known_digest is not None:
            return self.known_digest
        found = hashlib.sha256(f"{self.split} {len(self)} {self.classes}".encode())
        found.update(np.ascontiguousarray(self.labels, np.int64).tobytes())
        for number in range(len(self) if self.source is not None else 0):
            found.update(os.fsencode(self.name(number).removeprefix(self.root)) + b"\0")
        return found.hexdigest()

    def read(self, number: int) -> bytes:
        """The bytes of an encoded image.

        Raises:
            DataError: they cannot be read; the message names the image.
        """
        assert self.source is not None
        for wait in _WAITS:  # what a network's file system cannot give now it may give soon
            try:
                return self.source.read(number)
            except OSError as error:
                if error.errno not in _PASSING:
                    break
            time.sleep(wait)
        try:
            return self.source.read(number)
        except OSError as error:
            raise DataError(
                f"cannot read the image {self.name(number)}: {error.strerror or error}"
            ) from error

    def name(self, number: int) -> str:
        """An image's name, as messages give it."""
        return f"made-up image {number}" if self.source is None else self.source.name(number)


def synthetic_index(split: str, images: int | None = None, classes: int = 1000) -> ImageIndex:
    """`images` images that exist on no disk, for the synthetic loader alone; 12,800 to train on, 1,280 to validate."""
    count = (12_800 if split == "train" else 1_280) if images is None else images
    return ImageIndex(split, "", tuple(f"{c:04d}" for c in range(classes)), None, np.arange(count) % classes)
