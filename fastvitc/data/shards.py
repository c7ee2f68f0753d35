"""Images in tar shards: an index of where each lies, so that any image can be read in any order."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastvitc.data.folders import entries, some
from fastvitc.data.samples import Sample, samples
from fastvitc.data.source import EXTENSIONS, PLACE
from fastvitc.data.store import IndexWriter, read_columns
from fastvitc.data.tar import compressed
from fastvitc.errors import DataError

#: In the data folder, one class's name a line, for labels that are numbers.
CLASSES = "classes.txt"
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def find_shards(root: Path) -> list[Path]:
    """The tar files in the folder of a split, or one level below it; none where it holds class folders.

    Raises:
        DataError: shards lie beside class folders or images, or are compressed.
    """
    here, below = _tars(root), sorted(entry.name for entry in entries(root) if entry.is_dir())
    if here or not below or not _tars(root / below[0]):
        return here
    found = [_tars(root / name) for name in below]
    for name, shards in zip(below, found, strict=True):
        if not shards:
            raise DataError(
                f"{root / below[0]} holds shards and {root / name} none; keep either class folders or shards"
            )
    return [shard for shards in found for shard in shards]


def _tars(folder: Path) -> list[Path]:
    found = entries(folder)
    others = [e.name for e in found if e.is_dir() or e.name.lower().endswith(EXTENSIONS)]
    tars = sorted(e.name for e in found if e.name.lower().endswith(".tar"))
    packed = sorted(e.name for e in found if e.name.lower().endswith(_COMPRESSED))
    if tars and others:
        raise DataError(
            f"{folder} holds shards ({some(tars, most=1)}) beside other things ({some(sorted(others), most=1)}); "
            "keep either class folders or shards"
        )
    if packed and not others:
        raise compressed(folder / packed[0])
    return [folder / name for name in tars]


def write_shards(
    folder: Path, split: str, root: Path, shards: Sequence[Path], names: Sequence[str] | None
) -> tuple[str, ...]:
    """Write the index of the images in shards into a folder, ordered by class and name; their classes.

    Args:
        folder, split, root: as for `write_folders`.
        shards: the tar files.
        names: of the classes, where labels are numbers; None lets a class be called by its number.

    Raises:
        DataError: as `samples`; or labels and class folders are mixed, or there is a class without images or name.
    """
    unsorted = f"{split}-unsorted"
    classes = _Classes(root, names)
    with IndexWriter(folder, unsorted) as writer:
        for number, shard in enumerate(shards):
            found = list(samples(shard))
            places = [(number, sample.image.offset, sample.image.size) for sample in found]
            labels = np.array([classes.label(shard, sample) for sample in found], np.int64)
            writer.add(labels, [sample.image.name for sample in found], np.array(places, PLACE))
    labels, members, places = read_columns(folder, unsorted)
    for path in folder.glob(f"{unsorted}.*"):
        path.unlink()  # its room is free when this function ends
    if not len(labels):
        raise DataError(f"the shards in {root} hold no image ({' '.join(EXTENSIONS)})")
    order = np.argsort(labels, kind="stable").astype(np.int32)
    found, starts = np.unique(labels[order], return_index=True)
    final, called = classes.settle(found.tolist())
    groups = dict(zip(found.tolist(), np.split(order, starts[1:]), strict=True))
    with IndexWriter(folder, split) as writer:
        for first, label in sorted((final[label], label) for label in groups):
            chosen = sorted(groups[label].tolist(), key=members.__getitem__)
            writer.add(np.full(len(chosen), first), [members[n] for n in chosen], places[chosen])
        writer.finish(str(root), called, list(map(str, shards)))
    return called


class _Classes:
    """The classes of a split as its samples come: by number, or by folder in the order in which they are met."""

    def __init__(self, root: Path, names: Sequence[str] | None) -> None:
        self._root, self._names = root, names
        self._folders: dict[str, int] = {}
        self._numbered: bool | None = None

    def label(self, shard: Path, sample: Sample) -> int:
        """The number of a sample's class until `settle`."""
        where, numbered = f"{shard}:{sample.image.name}", sample.label is not None
        if self._numbered not in (None, numbered):
            raise DataError(
                f"the image {where} has {'a' if numbered else 'no'} label, others in {self._root} have "
                f"{'none' if numbered else 'one'}; expected one for each, or class folders and no labels"
            )
        self._numbered = numbered
        if not numbered:
            return self._folders.setdefault(sample.image.name.partition("/")[0], len(self._folders))
        if self._names is not None and sample.label >= len(self._names):
            raise DataError(
                f"the image {where} is of class {sample.label}, and {CLASSES} names {len(self._names)} classes, "
                "from 0; give it a line for each class"
            )
        return sample.label

    def settle(self, found: Sequence[int]) -> tuple[dict[int, int], tuple[str, ...]]:
        """(the label for each number that was found, the names of all classes)."""
        if not self._numbered:
            names = tuple(sorted(self._folders))
            return {self._folders[name]: label for label, name in enumerate(names)}, names
        if self._names is None and len(found) <= found[-1]:
            absent = next(n for n, label in enumerate(found) if n != label)
            raise DataError(
                f"no image in {self._root} is of class {absent}, though there is a class {found[-1]}; count classes "
                f"from 0, or list all their names in {CLASSES} in the data folder"
            )
        names = self._names or map(str, found)
        return {label: label for label in found}, tuple(names)
