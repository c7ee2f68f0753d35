import io
from dataclasses import asdict, replace

import numpy as np
import pytest
from PIL import Image

from fastvitc.training.report import EpochRow, Reporter, draw_curves, read_summary

ROWS = [
    EpochRow(i, 2.3 / i, 2.0 + 1 / 3, 60.1 + i, 95.0, 1e-3 / i, 1234.5, 0.01, 0.1 + 0.2, 7.25)
    for i in (1, 2, 3)
]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def report(folder, rows=ROWS, stream=None, earlier=(), **options):
    """Reports whole epochs of four steps with one log point; what was written to the stream."""
    stream = io.StringIO() if stream is None else stream
    folder.mkdir(exist_ok=True)
    reporter = Reporter(folder, rows=earlier, stream=stream, **options)
    for row in rows:
        reporter.start_epoch(row.epoch, 9, 4)
        for step in range(4):
            reporter.step()
            if step == 1:
                reporter.point(4 * row.epoch + step, "halfway", loss=1.5)
        reporter.end_epoch(row, 10 * row.epoch, f"end of {row.epoch}")
    reporter.close()
    return stream.getvalue()


def test_summary_rows_come_back_as_they_were(tmp_path):
    report(tmp_path)
    assert read_summary(tmp_path / "summary.csv") == ROWS


def test_the_summary_is_complete_after_each_epoch(tmp_path):
    reporter = Reporter(tmp_path, stream=io.StringIO())
    for i, row in enumerate(ROWS, start=1):
        reporter.end_epoch(row, 10 * row.epoch, "")
        assert read_summary(tmp_path / "summary.csv") == ROWS[:i]
    reporter.close()


def test_a_new_run_starts_an_empty_summary(tmp_path):
    report(tmp_path)
    report(tmp_path, rows=[])
    assert read_summary(tmp_path / "summary.csv") == []


def test_a_resumed_run_keeps_the_rows_before_it_and_drops_later_ones(tmp_path):
    report(tmp_path)
    again = [replace(ROWS[2], val_top1=1.0)]
    report(tmp_path, rows=again, earlier=ROWS[:2])
    assert read_summary(tmp_path / "summary.csv") == ROWS[:2] + again


def test_the_summary_holds_the_rows_of_the_state_whatever_the_file_held(tmp_path):
    report(tmp_path, rows=ROWS[:1])
    report(tmp_path, rows=ROWS[2:], earlier=ROWS[:2])
    assert read_summary(tmp_path / "summary.csv") == ROWS


def test_the_curves_are_a_picture_with_three_panels_of_lines(tmp_path):
    report(tmp_path)
    with Image.open(tmp_path / "curves.png") as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB")).astype(int)
    coloured = (np.ptp(pixels, axis=2) > 60).any(0)  # columns with a line; axes, grid and text are grey
    left, middle, right = np.array_split(coloured, 3)
    assert left.any()
    assert middle.any()
    assert right.any()


def test_other_rows_draw_other_curves(tmp_path):
    for name, rows in (("a.png", ROWS), ("b.png", [*ROWS[:2], replace(ROWS[2], train_loss=9.0)])):
        draw_curves(rows, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_a_run_that_ends_before_its_first_epoch_draws_nothing(tmp_path):
    report(tmp_path, rows=[])
    assert not (tmp_path / "curves.png").exists()


def test_a_terminal_gets_a_bar(tmp_path):
    text = report(tmp_path, stream=Terminal())
    assert "epoch 1/9" in text
    assert "\r" in text
    assert "2/4" in text
    assert "halfway" in text
    assert "end of 3\n" in text


def test_a_plain_stream_gets_lines_only(tmp_path):
    lines = report(tmp_path).split("\n")
    assert lines == ["halfway", "end of 1", "halfway", "end of 2", "halfway", "end of 3", ""]


def test_a_line_in_an_epoch_stands_above_the_bar(tmp_path):
    stream = Terminal()
    reporter = Reporter(tmp_path, stream=stream)
    reporter.start_epoch(1, 2, 4)
    reporter.line("note")
    reporter.close()
    assert "note\n" in stream.getvalue()


class Told:
    """A board that keeps what it is told."""

    def __init__(self):
        self.all = []

    def figures(self, kind, step, values):
        self.all.append((kind, step, values))

    def text(self, line):
        self.all.append(line)

    def close(self):
        self.all.append("closed")


def test_boards_get_figures_and_lines_apart(tmp_path):
    board = Told()
    reporter = Reporter(tmp_path, boards=[board], stream=io.StringIO())
    reporter.line("a note")
    reporter.start_epoch(1, 9, 4)
    reporter.point(3, "halfway", loss=1.5)
    reporter.end_epoch(ROWS[0], 4, "end")
    reporter.close()
    assert board.all == ["a note", ("step", 3, {"loss": 1.5}), ("epoch", 4, asdict(ROWS[0])), "closed"]


@pytest.mark.parametrize("count", [1, 2, 3, 40])
def test_the_ticks_of_the_curves_are_whole_epochs(count, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    monkeypatch.setattr("fastvitc.training.report.write_atomically", lambda path, write: write(path))
    draw_curves([replace(ROWS[0], epoch=i + 1) for i in range(count)], tmp_path / "curves.png")
    for axes in drawn[0].axes:
        low, high = axes.get_xlim()
        ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
        assert ticks
        assert all(tick == int(tick) for tick in ticks)
        assert all(line.get_marker() == "o" for line in axes.lines) == (count < 10)
