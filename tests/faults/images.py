"""Images that cannot be read, in training and in validation, with each loader."""

import re
import shutil
from pathlib import Path

from fastvitc.data import index_folder

from .broken import Broken, broken_images, pillow_images
from .place import Place
from .row import NotRun, Outcome
from .run import Run

_LOADERS = [("pil", 0), ("pil", 2), ("dali", 1)]


def corrupt(place: Place, trials: int) -> Outcome:
    """One file of each kind in both splits."""
    return _with_each_loader(place, broken_images(), trials)


def corpus(place: Place, trials: int) -> Outcome:
    """Pillow's own broken images in both splits."""
    try:
        files = pillow_images(place.shared)
    except OSError as error:
        raise NotRun(str(error)) from error
    return _with_each_loader(place, files, trials)


def _with_each_loader(place: Place, files: list[Broken], trials: int) -> Outcome:
    data = shutil.copytree(place.digits(), place.path("data"))
    for split in ("train", "val"):
        for file in files:
            file.put(data / split / "0")
        (data / split / "0" / "folder.jpg").mkdir()
    failures, counts = [], []
    for loader, workers in _LOADERS[:trials]:
        name = f"{loader} with {workers} workers"
        place.say(name)
        folder = place.path("run")
        options = ["--loader", loader, "--workers", str(workers)]
        args = [*place.options(data), *options]
        with place.start([*args, "--bad-share", "1", "-o", str(folder)]) as run:
            run.wait()
        found, wrong = _accounts(run, folder, data, files, loader)
        counts.append(f"{name} set {found} aside")
        with place.start([*args, "--bad-share", "0", "-o", str(place.path("run"))]) as run:
            if run.wait() != 1 or "--bad-share" not in run.errors:
                wrong.append(f"above the share it ended with {run.code}: {run.errors[-500:]}")
            wrong += [line for line in [run.one_line()] if line]
        failures += [f"{name}: {failure}" for failure in wrong]
    return Outcome(
        2 * len(files) * len(counts),
        f"{len(files)} files in each split; {', '.join(counts)}; each run ended with 0, and with 1 above the share",
        tuple(failures),
    )


def _accounts(run: Run, folder: Path, data: Path, files: list[Broken], loader: str) -> tuple[int, list[str]]:
    """How many images were set aside, and what does not fit."""
    if run.code != 0:
        return 0, [f"the run ended with {run.code}: {run.errors[-1000:]}"]
    listed = [line.partition("\t")[0] for line in (folder / "bad_files.txt").read_text().splitlines()]
    told = [int(number) for number in re.findall(r"warning: (\d+) images cannot be read", run.text)]
    failures = []
    if told[-1] != len(listed) or len({*listed}) != len(listed):
        failures.append(f"{told[-1]} images were told of and {len(listed)} are listed")
    validation = {Path(path).name for path in listed if Path(path).is_relative_to(data / "val")}
    seen = {int(number) for number in re.findall(r"top-5 [\d.]+% of (\d+),", run.text)}
    images = len(index_folder(data)[1])
    if seen != {images - len(validation)}:
        failures.append(f"{len(validation)} of {images} validation images are listed, and {seen} were seen")
    reads = {file.name: file.pil if loader == "pil" else file.dali for file in files}
    failures += [
        f"{name} was read" for name, read in reads.items() if read is False and name not in validation
    ]
    sound = {Path(path).name for path in listed} - {name for name, read in reads.items() if not read}
    return len(listed), failures + [f"{name} was not read" for name in sorted(sound)]
