"""Memory of the index of millions of images: `python -m bench.many_images`. Linux only; no image is on a disk.

A process writes the index of made-up names. Others, the ranks of one machine, map it, look at all of it and load some
batches with PIL, whose workers read one and the same image under every name. Counted is the proportional set size
(PSS) of all ranks and their workers: a page that processes share counts once.
"""

import argparse
import io
import re
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context, set_start_method
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bench.report import machine_line
from bench.resident import peak, resident
from fastvitc.data import LoaderConfig, create_loader, index_place
from fastvitc.data.source import Source
from fastvitc.data.store import IndexWriter, read_split
from fastvitc.programs.command import run_command
from fastvitc.tuning.machine import describe, versions

CPU = torch.device("cpu")
_SPLIT = "train"
_PAGE_OF_NAMES = 100  # names of some 30 bytes that lie in a page of 4096


@dataclass(frozen=True)
class Machine:
    """How much of what: `workers` processes of each of `ranks` processes load `images` images."""

    images: int
    classes: int
    ranks: int
    workers: int


@dataclass(frozen=True)
class Measured:
    """Bytes and seconds."""

    files: int
    builder: int
    writing: float
    begun: int
    total: int
    mapped: int
    loading: float


class _OneImage:
    """A source that has a name for each image and the bytes of one."""

    def __init__(self, names: Source) -> None:
        self._names = names
        file = io.BytesIO()
        Image.new("RGB", (32, 32), "gray").save(file, "JPEG")
        self._image = file.getvalue()

    def name(self, number: int) -> str:
        return self._names.name(number)

    def read(self, number: int) -> bytes:
        assert self.name(number)
        return self._image


def _write(place: Path, machine: Machine) -> None:
    counts = np.diff(np.linspace(0, machine.images, machine.classes + 1).astype(int)).tolist()
    classes = [f"n{label:08d}" for label in range(machine.classes)]
    with IndexWriter(place, _SPLIT) as writer:
        for label, (name, count) in enumerate(zip(classes, counts, strict=True)):
            images = [f"{name}/{name}_{number}.JPEG" for number in range(count)]
            writer.add(np.full(count, label), images)
        writer.finish("", classes)


def _written(place: Path, machine: Machine) -> tuple[int, float]:
    """(bytes at most above what the process began with, seconds)."""
    start, base = time.perf_counter(), resident("VmRSS")
    return peak(lambda: _write(place, machine)) - base, time.perf_counter() - start


def _rank(rank: int, place: Path, machine: Machine, parent: Connection) -> None:
    set_start_method("fork", force=True)  # of the workers, as in a process that torchrun started
    parent.send(0.0)
    parent.recv()
    start = time.perf_counter()
    index = read_split(place, _SPLIT)
    index = replace(index, source=_OneImage(index.source))
    assert index.labels.max() == machine.classes - 1
    for number in range(0, machine.images, _PAGE_OF_NAMES):
        index.name(number)
    settings = {"training": True, "batch_size": 16, "image_size": (32, 32), "device": CPU}
    config = LoaderConfig(index, rank=rank, world_size=machine.ranks, workers=machine.workers, **settings)
    loader = create_loader("pil", config)
    batches = iter(loader)
    for _ in range(8):
        next(batches)
    parent.send(time.perf_counter() - start)
    parent.recv()
    loader.close()


def measure(machine: Machine) -> Measured:
    """Write an index, map it in a rank's process each, and count."""
    context = get_context("spawn")
    with index_place() as place:
        with ProcessPoolExecutor(1, context) as pool:
            builder, writing = pool.submit(_written, place, machine).result()
        files = sum(path.stat().st_size for path in place.iterdir())
        pipes = [context.Pipe() for _ in range(machine.ranks)]
        ranks = [
            context.Process(target=_rank, args=(rank, place, machine, theirs))
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in ranks:
            process.start()
        ours = [pipe for pipe, _ in pipes]
        _together(ours)
        begun = sum(_pss(pid) for process in ranks for pid in _family(process.pid))
        for pipe in ours:
            pipe.send(None)
        loading = max(_together(ours))
        pids = [pid for process in ranks for pid in _family(process.pid)]
        total, mapped = sum(map(_pss, pids)), sum(_pss_of_files(pid, place) for pid in pids)
        for pipe, process in zip(ours, ranks, strict=True):
            pipe.send(None)
            process.join()
    return Measured(files, builder, writing, begun, total, mapped, loading)


def _together(pipes: list[Connection]) -> list[float]:
    return [pipe.recv() for pipe in pipes]


def _family(pid: int) -> Iterator[int]:
    """A process and those that it started."""
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            yield from _family(int(child))


def _pss(pid: int) -> int:
    return _sum_of_pss(Path(f"/proc/{pid}/smaps_rollup").read_text())


def _pss_of_files(pid: int, folder: Path) -> int:
    """What of a process's memory are files of a folder."""
    mappings = re.split(
        r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path(f"/proc/{pid}/smaps").read_text(), flags=re.MULTILINE
    )
    return sum(_sum_of_pss(mapping) for mapping in mappings if f" {folder}/" in mapping)


def _sum_of_pss(text: str) -> int:
    return 1024 * sum(map(int, re.findall(r"^Pss:\s+(\d+) kB$", text, re.MULTILINE)))


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.many_images", description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=14_000_000)
    parser.add_argument("--classes", type=int, default=21_841)
    parser.add_argument("--ranks", type=int, default=8, help="processes of the machine")
    parser.add_argument("--workers", type=int, default=2, help="PIL's processes of each rank")
    machine = Machine(**vars(parser.parse_args(args)))
    print(machine_line(describe(CPU), versions()))
    found = measure(machine)
    print(f"{machine.images:,} images in {machine.classes:,} classes; ", end="")
    print(f"{machine.ranks} ranks with {machine.workers} workers each.", end="\n\n")
    print("| | MB |\n|---|---|")
    for what, size in (
        ("the index's files", found.files),
        ("what writes them, at most, above its imports", found.builder),
        ("all ranks and workers, PSS", found.total),
        ("of it the index", found.mapped),
        ("the ranks before the index, PSS", found.begun),
    ):
        print(f"| {what} | {size / 1e6:,.0f} |")
    print(
        f"\nWritten in {found.writing:.1f} s; mapped, looked through and 8 batches loaded in {found.loading:.1f} s."
    )


if __name__ == "__main__":
    run_command("python -m bench.many_images", main)
