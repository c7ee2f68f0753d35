from importlib.metadata import PackageNotFoundError

import pytest
import torch

from fastvitc.tuning import machine


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
