"""What the main process tells of a run while it goes on; the other processes tell nothing."""

from collections.abc import Mapping, Sequence

from fastvitc.training.assembly import Parts
from fastvitc.training.boards import open_boards
from fastvitc.training.evaluation import Accuracy
from fastvitc.training.folder import RunFolder
from fastvitc.training.meter import duration
from fastvitc.training.profile import Profile
from fastvitc.training.report import EpochRow, Reporter, best_of
from fastvitc.training.step import compiled_graphs
from fastvitc.training.words import introduction, yardstick


class RunLog:
    """The log, the summary, the boards, the curves and the trace of a run.

    Args:
        parts: of the run.
        folder: of the run; None on all processes but the main one, where nothing is told.
        rows: of the epochs before.
        epoch, step: where the run begins or goes on.
        resumed: whether it goes on.
    """

    def __init__(
        self,
        parts: Parts,
        folder: RunFolder | None,
        rows: Sequence[EpochRow],
        epoch: int,
        step: int,
        resumed: bool,
    ) -> None:
        self._parts, self._folder, self._begun = parts, folder, (epoch, step)
        self._reporter, self._yardstick, self._profile = None, None, None
        self._forecast_told = self._stepped = False
        self._graphs: int | None = None
        self._bad_files = 0
        if folder is None:
            return
        run, values = parts.settings.run, parts.settings.to_dict()
        boards = open_boards(folder.path, epoch * parts.steps + step, run.board(), values)
        self._reporter = Reporter(folder.path, rows=rows, boards=boards)
        if run.profile is not None:
            self._profile = Profile(run.profile, folder.path / "trace.json")
        # On the main process alone: several at once would share the cores that they measure.
        self._yardstick = yardstick(parts)
        for line in introduction(parts, self._yardstick, folder.path):
            self._line(line)
        if resumed:
            place = f"after step {step} of {parts.steps}" if step else "at its start"
            self._line(f"resumed in epoch {epoch + 1}, {place}")

    def mfu(self, images_per_second: float) -> float:
        """The share of the peak, 0 where nothing is told."""
        return 0.0 if self._yardstick is None else self._yardstick.share(images_per_second)

    def start_epoch(self, epoch: int, step: int) -> None:
        """An epoch, from 0, of which so many steps are done."""
        if self._reporter is not None:
            epochs = self._parts.settings.optimisation.epochs
            self._reporter.start_epoch(epoch + 1, epochs, self._parts.steps, step)

    def step(self, first_seconds: float | None) -> None:
        """A step is done; the run's first one comes with its seconds."""
        self._stepped = True
        if self._reporter is not None:
            self._reporter.step()
        if self._profile is not None and self._profile.step():
            self._line(
                f"a trace of {self._parts.settings.run.profile} steps is in {self._folder.path / 'trace.json'}"
            )
        if first_seconds is not None:
            self._line(f"first step, compilation included: {first_seconds:.1f} s")

    def point(self, epoch: int, step: int, loss: float, lr: float, rates: tuple[float, float]) -> None:
        """A log point after a step of an epoch; `rates` are images per second and the share of waiting."""
        if self._reporter is None:
            return
        parts, (rate, wait) = self._parts, rates
        text = (
            f"  step {step}/{parts.steps}: loss {loss:.4f}, learning rate {lr:.2e}, "
            f"{rate:,.0f} images/s, data wait {wait:.0%}, MFU {self.mfu(rate):.1%}"
        )
        self._reporter.point(epoch * parts.steps + step, text, loss=loss, lr=lr, images_per_second=rate)
        self._forecast(parts.steps * parts.images_per_step / rate)

    def end_epoch(self, row: EpochRow, accuracy: Accuracy) -> None:
        """An epoch is trained and evaluated."""
        if self._reporter is None:
            return
        epochs = self._parts.settings.optimisation.epochs
        self._reporter.end_epoch(
            row,
            row.epoch * self._parts.steps,
            f"epoch {row.epoch}/{epochs}: loss {row.train_loss:.4f}, {_validation(row, accuracy)}"
            f"{row.images_per_second:,.0f} images/s, data wait {row.data_wait:.0%}, MFU {row.mfu:.1%}, "
            f"{row.seconds:.1f} s",
        )
        if self._begun <= (row.epoch - 1, 0):  # a whole one
            self._forecast(row.seconds)
        graphs = compiled_graphs()
        expected = self._parts.changes_at(row.epoch - 1)
        if self._graphs is not None and graphs > self._graphs and not expected:
            self._line(f"warning: {graphs - self._graphs} graphs were compiled anew in epoch {row.epoch}")
        self._graphs = graphs if self._stepped else None

    def went_back(self, why: str, epoch: int, step: int, skipped: int) -> None:
        """The run goes on from a state before, and leaves so many steps out."""
        if self._reporter is not None and self._folder is not None:
            self._reporter.stop_epoch()
            self._line(
                f"warning: {why}. The run goes back to epoch {epoch + 1}, step {step}, and leaves out {skipped} steps; "
                f"{self._folder.path / 'skipped.txt'} lists their images"
            )

    def bad_files(self, names: Mapping[str, str]) -> None:
        """The images that cannot be read, with the reasons; told when there are new ones."""
        if self._folder is None or len(names) == self._bad_files:
            return
        self._bad_files = len(names)
        self._folder.save_bad_files(dict(names))
        self._line(
            f"warning: {len(names)} images cannot be read; {self._folder.path / 'bad_files.txt'} lists them. "
            "In training others take their places, in validation they count as not seen"
        )

    def end(self, rows: Sequence[EpochRow]) -> None:
        """The run is done."""
        self._end_profile()
        if self._folder is not None:
            best, path = best_of(rows), self._folder.path
            self._line(
                f"best validation top-1: {best.val_top1:.2f}% in epoch {best.epoch}; weights: {path / 'best'}; "
                f"curves: {path / 'curves.png'}"
            )

    def close(self) -> None:
        """Draw the curves and release the files."""
        self._end_profile()
        if self._reporter is not None:
            self._reporter.close()

    def _end_profile(self) -> None:
        if self._profile is not None and self._profile.close():
            self._line("no trace was written: the run had too few steps for --profile")

    def _line(self, text: str) -> None:
        if self._reporter is not None:
            self._reporter.line(text)

    def _forecast(self, seconds: float) -> None:
        """Say once, as soon as it is known, how long an epoch takes here and what that makes of the run."""
        epochs = self._parts.settings.optimisation.epochs - self._begun[0]
        if not self._forecast_told and epochs > 1:
            one, all_of_them = duration(seconds), duration(epochs * seconds)
            self._line(f"an epoch takes about {one} on this machine, {epochs} epochs {all_of_them}")
        self._forecast_told = True


def _validation(row: EpochRow, accuracy: Accuracy) -> str:
    if not accuracy.images:
        return ""
    return (
        f"validation loss {row.val_loss:.4f}, top-1 {row.val_top1:.2f}%, top-5 {row.val_top5:.2f}% "
        f"of {accuracy.images}, "
    )
