"""Where a row keeps its runs, and how it starts them."""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from fastvitc.data import digits_folder

from . import warm
from .run import Run

ROOT = Path(__file__).resolve().parents[2]
#: The program, as a user starts it.
PROGRAM = [sys.executable, "-W", "error::FutureWarning", "-m", "fastvitc.programs.train"]
_NUMBERS = count(1)


@dataclass
class Place:
    """A folder for one row.

    Attributes:
        folder: the row's own.
        shared: what several rows use: the digits, undisturbed runs.
        warm: runs begin in forked processes, which saves their start; else each is a new interpreter.
        preload: a library that forked processes are begun with.
        quiet: say nothing of the progress.
        name: of the row, as its progress gives it.
    """

    folder: Path
    shared: Path
    warm: bool = False
    preload: Path | None = None
    quiet: bool = True
    name: str = ""

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.shared.mkdir(parents=True, exist_ok=True)

    def say(self, words: str) -> None:
        """A line of progress."""
        if not self.quiet:
            print(f"{self.name}: {words}", flush=True)

    def path(self, stem: str) -> Path:
        """A new path in the row's folder."""
        return self.folder / f"{stem}-{next(_NUMBERS)}"

    def digits(self, classes: int = 10, train: int = 16, val: int = 4) -> Path:
        """A folder of so many digits of each class, made once."""
        target = self.shared / f"digits-{classes}-{train}-{val}"
        if not target.is_dir():
            whole = digits_folder(self.shared)
            unfinished = self.path("digits")
            for split, images in (("train", train), ("val", val)):
                for name in sorted(os.listdir(whole / split))[:classes]:
                    (unfinished / split / name).mkdir(parents=True)
                    for file in sorted((whole / split / name).iterdir())[:images]:
                        shutil.copy(file, unfinished / split / name)
            _settle(unfinished, target)
        return target

    def options(self, data: Path | None = None, epochs: int = 3, batch: int = 16) -> list[str]:
        """A short run on digits: ten steps of each epoch, every one of which is a line of the log."""
        return [
            *("--data-dir", str(data or self.digits()), "--recipe", "digits", "--model", "vitc_nano"),
            *("--batch-size", str(batch), "--epochs", str(epochs), "--warmup-epochs", "1"),
            *("--workers", "0", "--no-compile", "--log-every", "1", "--peak-tflops", "1"),
        ]

    def start(
        self, args: Sequence[str], env: Mapping[str, str] | None = None, network: str | None = None
    ) -> Run:
        """Begin a run of the program, in a network namespace where one is named."""
        log, env = self.path("log"), {**_environment(), **(env or {})}
        if self.warm:
            return Run(warm.start(args, env, log, self.preload, network), log)
        inside = [] if network is None else ["ip", "netns", "exec", network]
        return self.command([*inside, *PROGRAM, *args], env, log)

    def command(
        self, command: Sequence[str], env: Mapping[str, str] | None = None, log: Path | None = None
    ) -> Run:
        """Begin any command and watch it as a run."""
        log, env = log or self.path("log"), _environment() if env is None else env
        with log.open("ab") as out, log.with_name(log.name + ".err").open("ab") as err:
            process = subprocess.Popen(
                [*map(str, command)], stdout=out, stderr=err, stdin=subprocess.DEVNULL, env=env, start_new_session=True
            )  # fmt: skip
        return Run(process, log)

    def ranks(self, args: Sequence[str], restarts: int = 0) -> Run:
        """Begin two processes under torchrun."""
        launcher = [
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            f"--max-restarts={restarts}",
        ]
        return self.command([sys.executable, "-m", *launcher, "-m", "fastvitc.programs.train", *args])

    def finished(self, args: Sequence[str], env: Mapping[str, str] | None = None, ranks: int = 1) -> Path:
        """The folder of a run that nothing disturbs; one that was made before is taken."""
        key = hashlib.sha256(repr((args, sorted((env or {}).items()), ranks)).encode()).hexdigest()[:16]
        folder = self.shared / f"finished-{key}"
        if not folder.is_dir():
            unfinished = self.path("undisturbed")
            args = [*args, "-o", str(unfinished)]
            with self.ranks(args) if ranks > 1 else self.start(args, env) as run:
                code = run.wait()
            if code != 0:
                raise RuntimeError(f"an undisturbed run ended with {code}: {run.errors[-2000:]}")
            _settle(unfinished, folder)
        return folder


def _settle(unfinished: Path, target: Path) -> None:
    """Move a folder to where rows share it, unless another row was faster."""
    try:
        unfinished.rename(target)
    except OSError:
        if not target.is_dir():
            raise


def _environment() -> dict[str, str]:
    """What every run gets: one thread, no GPU, the program of this checkout."""
    left = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "LD_PRELOAD")}
    return {**left, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
