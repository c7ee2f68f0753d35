import io
import math
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fastvitc.errors import UsageError
from fastvitc.training import meter
from fastvitc.training.meter import Meter
from fastvitc.training.process import Process, pick_device, process_group
from fastvitc.training.report import EpochRow, Reporter, draw_curves, read_summary
from fastvitc.tuning import machine

ALONE = Process(0, 1, torch.device("cpu"))
ROWS = [
    EpochRow(i, 2.3 / i, 2.0 + 1 / 3, 60.1 + i, 95.0, 1e-3 / i, 1234.5, 0.01, 0.1 + 0.2, 7.25)
    for i in (1, 2, 3)
]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def report(folder, rows=ROWS, stream=None, **options):
    """Reports whole epochs of four steps with one log point; what was written to the stream."""
    stream = io.StringIO() if stream is None else stream
    folder.mkdir(exist_ok=True)
    reporter = Reporter(folder, stream=stream, **options)
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
    report(tmp_path, rows=again, resumed_epochs=2)
    assert read_summary(tmp_path / "summary.csv") == ROWS[:2] + again


def test_rows_are_dropped_by_their_epoch_where_earlier_ones_are_missing(tmp_path):
    report(tmp_path, rows=ROWS[1:])
    report(tmp_path, rows=[], resumed_epochs=2)
    assert read_summary(tmp_path / "summary.csv") == ROWS[1:2]


def test_a_run_resumed_into_another_folder_starts_a_summary_there(tmp_path):
    report(tmp_path / "new", rows=ROWS[2:], resumed_epochs=2)
    assert read_summary(tmp_path / "new" / "summary.csv") == ROWS[2:]


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


def test_tensorboard_gets_epochs_and_points(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    report(tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, round(e.value, 4)) for e in events.Scalars("epoch/val_top1")] == [
        (10, 61.1),
        (20, 62.1),
        (30, 63.1),
    ]
    assert [e.step for e in events.Scalars("step/loss")] == [5, 9, 13]


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but where a test moves its `now`."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(meter, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def test_the_loss_is_the_mean_over_all_steps_even_those_before_a_restart(clock):
    measured = Meter(8, ALONE)
    measured.add(torch.tensor(1.0))
    measured.restart()
    for loss in (2.0, 6.0):
        measured.add(torch.tensor(loss))
    assert measured.mean_loss() == 3.0


def test_no_step_has_no_mean_loss(clock):
    assert math.isnan(Meter(8, ALONE).mean_loss())


def test_rates_count_the_time_since_the_restart(clock):
    measured = Meter(8, ALONE)
    clock.now += 50
    measured.add(torch.tensor(1.0))
    assert measured.restart() == 50
    for _ in range(3):
        with measured.waiting():
            clock.now += 1
        clock.now += 3
        measured.add(torch.tensor(1.0))
    assert measured.rates() == (3 * 8 / 12, 3 / 12)


def test_rates_before_any_time_has_passed_are_finite(clock):
    assert all(math.isfinite(rate) for rate in Meter(8, ALONE).rates())


def test_a_package_that_is_missing_is_listed_as_such(monkeypatch):
    real = machine.version

    def version(package):
        if package == "timm":
            raise PackageNotFoundError(package)
        return real(package)

    monkeypatch.setattr(machine, "version", version)
    found = machine.versions()
    assert found["timm"] == "not installed"
    assert found["torch"] == torch.__version__.split("+")[0] or found["torch"] == torch.__version__
    assert {"python", "torchvision", "triton", "xformers"} <= found.keys()


def test_peaks_are_the_work_over_the_median_time(monkeypatch):
    monkeypatch.setattr(machine, "_seconds", lambda call, device, rounds: (call(), 0.5)[1])
    cpu = torch.device("cpu")
    assert machine.matmul_peak(cpu, torch.float32, size=16) == 2 * 16**3 / 0.5
    assert machine.copy_peak(cpu, megabytes=1) == 2 * 2**20 / 0.5


def test_measured_peaks_are_positive():
    cpu = torch.device("cpu")
    assert machine.matmul_peak(cpu, torch.bfloat16, size=16, rounds=2) > 0
    assert machine.copy_peak(cpu, megabytes=1, rounds=2) > 0


def test_the_yardstick_of_a_cpu_is_measured(monkeypatch):
    monkeypatch.setattr(machine, "matmul_peak", lambda device, dtype: 7.0)
    assert machine.flops_peak(torch.device("cpu"), torch.bfloat16) == (7.0, "measured bfloat16 matmul")


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.bfloat16, (989e12, "NVIDIA H100 80GB HBM3 data sheet, dense bfloat16")),
        (torch.float32, (7.0, "measured float32 matmul")),
    ],
)
def test_the_yardstick_of_a_known_gpu_is_its_data_sheet_in_half_precision_only(dtype, expected, monkeypatch):
    monkeypatch.setattr(machine, "describe", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(machine, "matmul_peak", lambda device, dtype: 7.0)
    assert machine.flops_peak(torch.device("cuda"), dtype) == expected


def test_the_processor_is_described_with_its_threads():
    assert f"{torch.get_num_threads()} threads" in machine.describe(torch.device("cpu"))


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("name", ["gpu", "cpu:x", "mps", "meta", ""])
def test_an_unknown_device_is_refused(name):
    with pytest.raises(UsageError, match=f"unknown device '{name}'; use auto, cpu or cuda"):
        pick_device(name)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_a_gpu_that_is_not_there_is_refused(name):
    with pytest.raises(UsageError, match=f"device '{name}' was asked for, but PyTorch finds no CUDA device"):
        pick_device(name)


@pytest.mark.usefixtures("no_gpu")
def test_auto_is_the_cpu_without_a_gpu():
    assert pick_device("auto") == torch.device("cpu")


def test_auto_is_the_gpu_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == torch.device("cuda")


@pytest.mark.parametrize("world_size", [None, "1"])
def test_a_process_alone_is_the_main_one_of_one(world_size, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world_size is not None:
        monkeypatch.setenv("WORLD_SIZE", world_size)
    with process_group("cpu") as process:
        assert (process.rank, process.world_size, process.is_main) == (0, 1, True)
        assert not torch.distributed.is_initialized()


def test_collectives_of_a_process_alone_change_nothing():
    with process_group("cpu") as process:
        assert process.sum(torch.tensor(3.0)) == 3
        norm = nn.BatchNorm1d(2)
        norm.running_mean.fill_(5)
        process.average_statistics(norm)
        assert (norm.running_mean == 5).all()


def test_a_resumed_run_keeps_what_tensorboard_had(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    report(tmp_path, rows=ROWS[:2])
    report(tmp_path, rows=ROWS[2:], resumed_epochs=2, resumed_steps=20)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("epoch/val_top1")] == [10, 20, 30]
