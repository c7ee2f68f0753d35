"""What lies where in a tar file, from its headers alone."""

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from fastvitc.errors import DataError

_BLOCK = 512
_GZIP = b"\x1f\x8b"


class Member(NamedTuple):
    """A file in a tar file: `size` bytes from `offset`."""

    name: str
    offset: int
    size: int


def members(path: Path, file: BinaryIO) -> Iterator[Member]:
    """The files in an open tar file in their order, without hidden ones, whose path has a name that starts with a dot.

    Raises:
        DataError: the file is compressed, cut off or damaged, or a member is not stored as a whole file.
    """
    if os.pread(file.fileno(), len(_GZIP), 0) == _GZIP:
        raise compressed(path)
    size = os.fstat(file.fileno()).st_size
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # else it keeps them all
                name = member.name.removeprefix("./").lstrip("/")
                if member.isdir() or any(part.startswith(".") for part in name.split("/")):
                    continue
                if not member.isreg() or member.issparse():
                    raise DataError(
                        f"{path} holds {name} as a link, a sparse or a special file; expected whole files: "
                        "pack it again with tar --dereference --hard-dereference"
                    )
                if member.offset_data + -(-member.size // _BLOCK) * _BLOCK > size:
                    raise _cut_off(path, name)
                yield Member(name, member.offset_data, member.size)
            end = os.pread(file.fileno(), _BLOCK, tar.offset)
    except (tarfile.TarError, ValueError) as error:
        raise DataError(f"{path} is no whole tar file ({error}); fetch or pack it again") from error
    except OSError as error:
        raise DataError(f"cannot read the shard {path}: {error.strerror or error}") from error
    if len(end) < _BLOCK:
        raise _cut_off(path, "its end")
    if any(end):
        raise DataError(f"{path} is damaged at byte {tar.offset}; fetch or pack it again")


def compressed(path: Path) -> DataError:
    """The error for a tar file that is compressed."""
    return DataError(
        f"{path} is compressed, so that its images cannot be read one by one; unpack it to a plain .tar"
    )


def _cut_off(path: Path, where: str) -> DataError:
    return DataError(f"{path} is cut off at {where}; fetch or pack it again")
