"""The samples of a tar shard as WebDataset has them: members in a row that share a name up to its first dot."""

import json
import os
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from fastvitc.data.source import EXTENSIONS
from fastvitc.data.tar import Member, members
from fastvitc.errors import DataError

_LABELS = ("cls", "json")
_LARGEST = 2**31 - 1


class Sample(NamedTuple):
    """An image in a shard; its label is a number, or None where its class is its folder."""

    image: Member
    label: int | None


def samples(path: Path) -> Iterator[Sample]:
    """The images of a shard in their order.

    Raises:
        DataError: as `members`; or a sample lacks its label or its image, has several images or a label that is no
            number.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"cannot read the shard {path}: {error.strerror}") from error
    with file:
        for key, group in groupby(members(path, file), _key):
            found = list(group)
            images = [member for member in found if member.name.lower().endswith(EXTENSIONS)]
            by_extension = {_extension(member): member for member in found}
            labels = {name: by_extension[name] for name in _LABELS if name in by_extension}
            label = _label(path, file.fileno(), labels)
            yield from _sample(f"{path}:{key}", images, label, bool(labels))


def _key(member: Member) -> str:
    folder, slash, name = member.name.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _extension(member: Member) -> str:
    return member.name.rpartition("/")[2].partition(".")[2].lower()


def _sample(where: str, images: list[Member], label: int | None, labelled: bool) -> Iterator[Sample]:
    if labelled and not images:
        raise DataError(
            f"the sample {where} has a label and no image ({' '.join(EXTENSIONS)}); "
            "the members of a sample must follow each other"
        )
    if label is not None and len(images) > 1:
        raise DataError(f"the sample {where} has {len(images)} images; expected one for a label")
    for image in images:
        if label is None and "/" not in image.name:
            raise DataError(
                f"the sample {where} has no label; expected {where.rpartition(':')[2]}.cls with the number of its "
                'class, a .json with "label" or "cls", or images in class folders'
            )
        yield Sample(image, label)


def _label(path: Path, descriptor: int, labels: dict[str, Member]) -> int | None:
    """The number in the .cls, else in the .json; None where a .json has other things to say."""
    for kind, member in labels.items():
        text = os.pread(descriptor, member.size, member.offset)
        try:
            value = int(text) if kind == "cls" else _of_json(json.loads(text))
        except ValueError:
            value = text.decode(errors="replace")
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _LARGEST:
            raise DataError(
                f"the label {path}:{member.name} is {str(value)[:40]!r}; expected the number of a class, from 0"
            )
        return value
    return None


def _of_json(content: object) -> object:
    return content.get("label", content.get("cls")) if isinstance(content, dict) else None
