"""Finds the images in a data folder: class folders or tar shards in `train/` and `val/`."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fastvitc.data.folders import LAYOUT, some, subfolders, write_folders
from fastvitc.data.index import ImageIndex
from fastvitc.data.shards import CLASSES, find_shards, write_shards
from fastvitc.data.store import read_split
from fastvitc.errors import DataError
from fastvitc.files import temporary_folder

SPLITS = ("train", "val")


def index_folder(data_dir: str | os.PathLike[str]) -> tuple[ImageIndex, ImageIndex]:
    """The images under `data_dir/train` and `data_dir/val`: in `<class>/`, in subfolders too, or in tar shards.

    Names that start with a dot are ignored, and in class folders files whose extension is not in `EXTENSIONS`.

    Raises:
        DataError: a folder is missing, empty or unreadable, a class has no image, or the two splits' classes differ;
            a shard is damaged or compressed, or a sample in it has no label or no image.
    """
    with index_place() as place:
        write_index(data_dir, place)
        return read_index(place)


def index_split(
    folder: str | os.PathLike[str], split: str = "val", *, classes: Sequence[str] | None = None
) -> ImageIndex:
    """The images of one split: those under `folder/<split>`, else under `folder`; `classes` as in `write_index`.

    Raises:
        DataError: as `index_folder`.
    """
    root = Path(folder)
    with index_place() as place:
        below = root / split if split in subfolders(root) else root
        names = read_class_names(root / CLASSES) if classes is None else classes
        _write_split(place, split, below, names, classes)
        return read_split(place, split)


def write_index(
    data_dir: str | os.PathLike[str],
    place: Path,
    *,
    splits: tuple[str, str] = SPLITS,
    classes: Sequence[str] | None = None,
) -> None:
    """Write what `index_folder` finds into a folder, for `read_index`.

    Args:
        data_dir: holds the images.
        place: where the index goes.
        splits: the names of the folders with the training and validation images.
        classes: names of the classes in the order of their labels; other class folders are left out. In shards they
            are the names of labels that are numbers. None takes all classes, sorted.

    Raises:
        DataError: as `index_folder`.
    """
    root = Path(data_dir)
    missing = [split for split in splits if split not in subfolders(root)]
    if missing:
        raise DataError(f"{root} has no folder {some(missing, ' and ')}; {LAYOUT}")
    names = read_class_names(root / CLASSES) if classes is None else classes
    train, val = (
        _write_split(place, split, root / folder, names, classes)
        for split, folder in zip(SPLITS, splits, strict=True)
    )
    if train != val:
        only = zip(splits, (sorted(set(train) - set(val)), sorted(set(val) - set(train))), strict=True)
        differences = [f"only in {folder}: {some(found)}" for folder, found in only if found]
        raise DataError(
            f"the classes of {' and '.join(str(root / folder) for folder in splits)} differ; "
            f"{'; '.join(differences)}. Give both the same classes"
        )


def read_index(place: Path) -> tuple[ImageIndex, ImageIndex]:
    """The training and validation images of an index that was written into a folder, which may go afterwards.

    Raises:
        OSError: its files cannot be opened.
    """
    train, val = (read_split(place, split) for split in SPLITS)
    return train, val


@contextmanager
def index_place() -> Iterator[Path]:
    """A temporary folder for an index.

    Raises:
        DataError: it cannot be made or written to.
    """
    try:
        with temporary_folder() as place:
            yield place
    except OSError as error:
        raise DataError(
            f"cannot keep the index of the images in a temporary folder ({error}); "
            "set TMPDIR to a folder with room"
        ) from error


def _write_split(
    place: Path, split: str, root: Path, names: Sequence[str] | None, classes: Sequence[str] | None
) -> tuple[str, ...]:
    shards = find_shards(root)
    if shards:
        return write_shards(place, split, root, shards, names)
    return write_folders(place, split, root, classes)


def read_class_names(path: Path) -> tuple[str, ...] | None:
    """The names in a file, one in each line; None where there is no file.

    Raises:
        DataError: it cannot be read, or has an empty line or a name twice.
    """
    try:
        names = tuple(path.read_text(encoding="utf-8").split("\n"))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the names of the classes in {path}: {error}") from error
    names = tuple(name.strip() for name in (names[:-1] if not names[-1].strip() else names))
    if not all(names) or len(set(names)) < len(names):
        raise DataError(
            f"{path} has an empty line or a name twice; expected the name of a class in each line"
        )
    return names
