"""Images in class folders, as ImageNet has them: `<class>/<image>`, in subfolders too."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastvitc.data.source import EXTENSIONS
from fastvitc.data.store import IndexWriter
from fastvitc.errors import DataError

LAYOUT = "expected {train,val}/<class>/<image>, or tar shards in {train,val}"


def write_folders(
    folder: Path, split: str, root: Path, wanted: Sequence[str] | None = None
) -> tuple[str, ...]:
    """Write the index of the images under `root/<class>/` into a folder; their classes.

    With `wanted` those classes, in that order.

    Raises:
        DataError: there is no class folder, one has no image or cannot be read, or a shard lies among the images.
    """
    classes = subfolders(root)
    if not classes:
        raise DataError(f"{root} has no class folders; {LAYOUT}")
    if wanted is not None:
        missing = [name for name in wanted if name not in set(classes)]
        if missing:
            raise DataError(f"{root} has no folder for these classes of the class map: {some(missing)}")
        classes = list(wanted)
    empty = []
    with IndexWriter(folder, split) as writer:
        for label, name in enumerate(classes):
            images = _images(root, name)
            writer.add(np.full(len(images), label), images)
            empty += [] if images else [name]
        if empty:
            raise DataError(
                f"{root} has class folders without images: {some(empty)}; "
                f"add images ({' '.join(EXTENSIONS)}) or remove the folders"
            )
        writer.finish(str(root), classes)
    return tuple(classes)


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted."""
    return sorted(entry.name for entry in entries(folder) if entry.is_dir())


def entries(folder: Path) -> list[os.DirEntry[str]]:
    """What a folder holds, without names that start with a dot."""
    try:
        with os.scandir(folder) as found:
            return [entry for entry in found if not entry.name.startswith(".")]
    except FileNotFoundError:
        raise DataError(f"there is no folder {folder}; {LAYOUT}") from None
    except OSError as error:
        raise DataError(f"cannot read the folder {folder}: {error.strerror}") from error


def some(names: Sequence[str], separator: str = ", ", most: int = 5) -> str:
    """The first names, and how many more there are."""
    shown = separator.join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _images(root: Path, below: str, above: tuple[tuple[int, int], ...] = ()) -> list[str]:
    """The images in the folder `root/below` and under it, from `root` on, sorted.

    `above`: (device, inode) of the folders that lead here.
    """
    status = (root / below).stat()
    place = status.st_dev, status.st_ino
    if place in above:
        raise DataError(f"the folder {root / below} leads back to a folder that holds it; remove that link")
    found = []
    for entry in entries(root / below):
        name = entry.name.lower()
        if entry.is_dir():
            found += _images(root, f"{below}/{entry.name}", (*above, place))
        elif name.endswith(".tar"):
            raise DataError(
                f"the shard {entry.path} lies in a class folder; keep either class folders or shards"
            )
        elif name.endswith(EXTENSIONS) and entry.is_file():
            found.append(f"{below}/{entry.name}")
    return sorted(found)
