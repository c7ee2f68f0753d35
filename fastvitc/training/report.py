"""What a run tells: a progress bar or plain lines, its boards, summary.csv and the picture of the curves."""

import csv
import io
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from fastvitc.files import write_atomically
from fastvitc.training.boards import Board


@dataclass(frozen=True)
class EpochRow:
    """One line of summary.csv. Rates are of this epoch; `mfu` and `data_wait` are shares from 0 to 1.

    What is of a validation is nan where there was none.
    """

    epoch: int
    train_loss: float
    val_loss: float
    val_top1: float
    val_top5: float
    lr: float
    images_per_second: float
    data_wait: float
    mfu: float
    seconds: float


def best_of(rows: Sequence[EpochRow]) -> EpochRow:
    """The first row of the highest accuracy; the last row where nothing was validated."""
    return max(
        (row for row in rows if isfinite(row.val_top1)), key=lambda row: row.val_top1, default=rows[-1]
    )


class Reporter:
    """Writes a run's log into its folder and to a stream; made on the main process only.

    Args:
        folder: of the run.
        rows: epochs of an earlier part of the run; what it logged later is dropped.
        boards: where the figures go as well.
        stream: for lines and the bar; a bar is drawn only on a terminal.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rows: Sequence[EpochRow] = (),
        boards: Sequence[Board] = (),
        stream: TextIO | None = None,
    ) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._csv = folder / "summary.csv"
        self._curves = folder / "curves.png"
        self._rows = list(rows)
        self._write_csv()
        self._boards = boards
        self._bar: tqdm | None = None

    def line(self, text: str) -> None:
        """One line of text."""
        for board in self._boards:
            board.text(text)
        self._show(text)

    def _show(self, text: str) -> None:
        if self._bar is None:
            print(text, file=self._stream, flush=True)
        else:
            self._bar.write(text, file=self._stream)

    def start_epoch(self, epoch: int, epochs: int, steps: int, done: int = 0) -> None:
        """An epoch of so many steps, of which some are done."""
        if self._stream.isatty():
            title = f"epoch {epoch}/{epochs}"
            self._bar = tqdm(total=steps, initial=done, desc=title, file=self._stream, leave=False)

    def step(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def point(self, step: int, text: str, **scalars: float) -> None:
        """A log point within an epoch."""
        for board in self._boards:
            board.figures("step", step, scalars)
        if self._bar is None:
            self._show(text)
        else:
            self._bar.set_postfix_str(text)

    def stop_epoch(self) -> None:
        """Leave an epoch, at its end or before it."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def end_epoch(self, row: EpochRow, step: int, text: str) -> None:
        """The end of an epoch, after optimiser step number `step`."""
        self.stop_epoch()
        self._rows.append(row)
        self._write_csv()
        for board in self._boards:
            board.figures("epoch", step, asdict(row))
        self._show(text)

    def close(self) -> None:
        """Draw the curves and release the files."""
        self.stop_epoch()
        if self._rows:
            draw_curves(self._rows, self._curves)
        for board in self._boards:
            board.close()

    def _write_csv(self) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=list(EpochRow.__dataclass_fields__))
        writer.writeheader()
        writer.writerows(asdict(row) for row in self._rows)
        write_atomically(self._csv, lambda path: path.write_text(text.getvalue(), newline=""))


def read_summary(path: Path) -> list[EpochRow]:
    """The rows of a summary.csv."""
    with path.open(newline="") as file:
        return [
            EpochRow(epoch=int(row.pop("epoch")), **{k: float(v) for k, v in row.items()})
            for row in csv.DictReader(file)
        ]


def draw_curves(rows: list[EpochRow], path: Path) -> None:
    """Loss, accuracy and learning rate by epoch, as a PNG."""
    from matplotlib.figure import Figure  # slow to import
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    losses, accuracy, rate = figure.subplots(1, 3)
    epochs = [row.epoch for row in rows]
    losses.plot(epochs, [row.train_loss for row in rows], label="train, with its smoothing and mixing")
    validated = [row for row in rows if isfinite(row.val_top1)]
    losses.plot([row.epoch for row in validated], [row.val_loss for row in validated], label="validation")
    losses.set(title="Loss", xlabel="epoch")
    losses.legend()
    accuracy.plot([row.epoch for row in validated], [row.val_top1 for row in validated])
    best = best_of(rows)
    accuracy.set(title=f"Validation top-1, best {best.val_top1:.2f}% (epoch {best.epoch})", xlabel="epoch")
    rate.plot(epochs, [row.lr for row in rows])
    rate.set(title="Learning rate at the epoch's end", xlabel="epoch")
    for axes in (losses, accuracy, rate):
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlim(min(epochs) - 0.5, max(epochs) + 0.5)
        for line in axes.lines if len(epochs) < 10 else ():  # a line through one point cannot be seen
            line.set_marker("o")
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))
