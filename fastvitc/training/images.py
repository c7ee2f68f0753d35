"""The index of the images, which one process of each machine makes and all of its processes map."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from fastvitc.data import ImageIndex, index_place, read_index
from fastvitc.errors import DataError, FastvitcError, UsageError
from fastvitc.training.process import Process


def shared_images(process: Process, write: Callable[[Path], None]) -> tuple[ImageIndex, ImageIndex]:
    """The training and validation images; local rank 0 lets `write` put their index into a folder, see `write_index`.

    The folder is gone when this ends, however it ends. Every process must come here; an error ends them all.

    Raises:
        DataError: the images cannot be indexed, or those of two machines differ.
    """
    with ExitStack() as held:
        place, failure = None, None
        if process.local_rank == 0:
            try:
                place = held.enter_context(index_place())
                write(place)
            except Exception as error:
                failure = error
        _end_together(process, failure)
        places, builder = process.gather(place), process.rank - process.local_rank
        try:
            images = _mapped(places[builder] if builder >= 0 else None, builder)
        except FastvitcError as error:
            failure = error
        _end_together(process, failure)
    _check_alike(process, *images)
    return images


def _mapped(place: Path | None, builder: int) -> tuple[ImageIndex, ImageIndex]:
    if place is None:
        raise UsageError(
            "no process of this machine has LOCAL_RANK 0; number those of a machine one after another, "
            "as torchrun does"
        )
    try:
        return read_index(place)
    except OSError as error:
        raise DataError(
            f"cannot open the index that rank {builder} wrote ({error}); "
            "let all processes of a machine see one temporary folder (TMPDIR)"
        ) from error


def _end_together(process: Process, failure: Exception | None) -> None:
    failed = process.gather(failure is not None, late=True)  # of millions of files
    if failure is not None:
        raise failure
    if any(failed):
        raise FastvitcError(f"rank {failed.index(True)} has no index of the images; its message says why")


def _check_alike(process: Process, train: ImageIndex, val: ImageIndex) -> None:
    found = process.gather((train.digest, val.digest, _told(train, val)))
    for rank, (*digests, told) in enumerate(found):
        if digests != [*found[0][:2]]:
            raise DataError(
                f"rank {rank} has other images than rank 0: {told} there, {found[0][2]} here; "
                "give every machine the same data"
            )


def _told(train: ImageIndex, val: ImageIndex) -> str:
    return f"{len(train)} and {len(val)} in {train.root} and {val.root}"
