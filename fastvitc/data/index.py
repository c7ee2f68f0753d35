"""Which images there are: folders in ImageNet's layout, one folder per class.

To a loader an image is a number: `ImageIndex.read(number)` gives its bytes. For images that are kept otherwise than as
files, write another `Source`.
"""

import errno
import hashlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from fastvitc.errors import DataError

EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_PASSING = {errno.EAGAIN, errno.EINTR, errno.EIO, errno.ESTALE, errno.ETIMEDOUT}
_WAITS = (0.1, 1.0)  # seconds before a read is tried again
_LAYOUT = "expected {train,val}/<class>/<image>"


class Source(Protocol):
    """Where images are kept, by their numbers from 0."""

    def read(self, number: int) -> bytes:
        """The bytes of the encoded image; OSError where they cannot be had."""

    def name(self, number: int) -> str:
        """The image's name, as messages give it."""


class Files:
    """Images that are files of their own.

    Their paths lie in one buffer: worker processes that touch a million strings would each end up with a copy of them.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = np.array([os.fsencode(path) for path in paths])

    def read(self, number: int) -> bytes:
        return Path(self.name(number)).read_bytes()

    def name(self, number: int) -> str:
        return os.fsdecode(self._paths[number])


@dataclass(frozen=True, eq=False)
class ImageIndex:
    """The images of one split, ordered by class and name.

    Attributes:
        split: `"train"` or `"val"`.
        root: the folder that holds the class folders.
        classes: class names in sorted order; a label is a position in it.
        source: where the images are kept; None where they are made up, see `synthetic_index`.
        labels: int64, shape (images,).
    """

    split: str
    root: str
    classes: tuple[str, ...]
    source: Source | None
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def digest(self) -> str:
        """A hash of the images' names and labels: another one means other images, or another order."""
        found = hashlib.sha256(f"{self.split} {len(self)} {self.classes}".encode())
        found.update(np.ascontiguousarray(self.labels).tobytes())
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


def index_folder(data_dir: str | os.PathLike[str]) -> tuple[ImageIndex, ImageIndex]:
    """The images under `data_dir/train/<class>/` and `data_dir/val/<class>/`, in subfolders too.

    Files whose extension is not in `EXTENSIONS` and names that start with a dot are ignored.

    Raises:
        DataError: a folder is missing, empty or unreadable, a class has no image, or the two splits' classes differ.
    """
    root = Path(data_dir)
    missing = [split for split in ("train", "val") if split not in _subfolders(root)]
    if missing:
        raise DataError(f"{root} has no folder {_some(missing, ' and ')}; {_LAYOUT}")
    train, val = _index("train", root / "train"), _index("val", root / "val")
    if train.classes != val.classes:
        only_train = sorted(set(train.classes) - set(val.classes))
        only_val = sorted(set(val.classes) - set(train.classes))
        differences = [f"only in {s}: {_some(c)}" for s, c in (("train", only_train), ("val", only_val)) if c]
        raise DataError(
            f"the classes of {train.root} and {val.root} differ; {'; '.join(differences)}. "
            "Give both the same class folders"
        )
    return train, val


def index_split(folder: str | os.PathLike[str], split: str = "val") -> ImageIndex:
    """The images of one split: those under `folder/<split>/<class>/`, else under `folder/<class>/`.

    Raises:
        DataError: as `index_folder`.
    """
    root = Path(folder)
    return _index(split, root / split if split in _subfolders(root) else root)


def synthetic_index(split: str, images: int | None = None, classes: int = 1000) -> ImageIndex:
    """`images` images that exist on no disk, for the synthetic loader alone; 12,800 to train on, 1,280 to validate."""
    count = (12_800 if split == "train" else 1_280) if images is None else images
    return ImageIndex(split, "", tuple(f"{c:04d}" for c in range(classes)), None, np.arange(count) % classes)


def _index(split: str, root: Path) -> ImageIndex:
    classes = _subfolders(root)
    if not classes:
        raise DataError(f"{root} has no class folders; {_LAYOUT}")
    files = [_images(root / name) for name in classes]
    empty = [name for name, found in zip(classes, files, strict=True) if not found]
    if empty:
        raise DataError(
            f"{root} has class folders without images: {_some(empty)}; "
            f"add images ({' '.join(EXTENSIONS)}) or remove the folders"
        )
    return ImageIndex(
        split,
        str(root),
        tuple(classes),
        Files([path for found in files for path in found]),
        np.repeat(np.arange(len(classes)), [len(found) for found in files]),
    )


def _subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in _entries(folder) if entry.is_dir())


def _images(folder: Path, above: tuple[tuple[int, int], ...] = ()) -> list[str]:
    """Paths of the images in a folder and below it. `above`: (device, inode) of the folders that lead here."""
    status = folder.stat()
    place = status.st_dev, status.st_ino
    if place in above:
        raise DataError(f"the folder {folder} leads back to a folder that holds it; remove that link")
    found = []
    for entry in _entries(folder):
        if entry.is_dir():
            found += _images(Path(entry.path), (*above, place))
        elif entry.name.lower().endswith(EXTENSIONS) and entry.is_file():
            found.append(entry.path)
    return sorted(found)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except FileNotFoundError:
        raise DataError(f"there is no folder {folder}; {_LAYOUT}") from None
    except OSError as error:
        raise DataError(f"cannot read the folder {folder}: {error.strerror}") from error


def _some(names: Sequence[str], separator: str = ", ", most: int = 5) -> str:
    shown = separator.join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
