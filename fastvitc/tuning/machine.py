"""What this machine is, and how fast it multiplies and copies: the yardsticks of throughput figures."""

import os
import platform
import shutil
import statistics
import sysconfig
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch

from fastvitc.kernels.cpu.cpuinfo import cpu_flags, cpu_name
from fastvitc.tuning.clock import seconds

#: Dense bfloat16 and float16 peaks in floating-point operations (a multiply-add is two) per second, vendor data sheets,
#: by the device's own name.
_GPU_PEAKS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}
Precision = Literal["bf16", "fp16", "fp32"]
#: The dtype of autocast by the name of a setting; float32 turns it off.
PRECISIONS: dict[Precision, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}

_PACKAGES = ("torch", "torchvision", "triton", "xformers", "timm")
_DALI = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")


def processor() -> str:
    """The CPU's name with its core count, and the matrix and vector units PyTorch sees."""
    return f"{cpu_name()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Autocast to a dtype on a device; float32 turns it off."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def fast_precision() -> Precision:
    """bf16 where there is a GPU, or a CPU that multiplies in it; others are slower in it than in float32."""
    return (
        "bf16" if torch.cuda.is_available() or {"avx512_bf16", "amx_bf16", "bf16"} & cpu_flags() else "fp32"
    )


def can_compile() -> bool:
    """Whether torch.compile finds what it needs: there is a GPU, or for a CPU a C++ compiler and Python's headers."""
    headers = Path(sysconfig.get_path("include"), "Python.h")
    return torch.cuda.is_available() or bool(shutil.which(os.environ.get("CXX", "g++")) and headers.exists())


def describe(device: torch.device) -> str:
    """The device in words."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def versions(*more: str) -> dict[str, str]:
    """Versions of Python, the libraries that matter here and `more` packages; "not installed" where one is missing."""
    dali = next((package for package in _DALI if _version(package)), _DALI[0])
    found = {package: _version(package) or "not installed" for package in (*_PACKAGES, dali, *more)}
    return {"python": platform.python_version(), **found}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _seconds(call: Callable[[], object], device: torch.device, rounds: int) -> float:
    """The median of `rounds` calls, after one that is not timed."""
    call()
    return statistics.median(seconds(call, device) for _ in range(rounds))


def matmul_peak(device: torch.device, dtype: torch.dtype, size: int = 2048, rounds: int = 5) -> float:
    """Measured floating-point operations per second of one large matrix product (a multiply-add is two)."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _seconds(lambda: a @ b, device, rounds)


def copy_peak(device: torch.device, megabytes: int = 256, rounds: int = 5) -> float:
    """Measured bytes per second of one large copy, read and write counted."""
    source = torch.ones(megabytes * 2**18, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source), device, rounds)


def flops_peak(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """The yardstick of an MFU and where it comes from: the data sheet of a known GPU, else a measured product."""
    name = describe(device)
    if name in _GPU_PEAKS and dtype in (torch.bfloat16, torch.float16):
        return _GPU_PEAKS[name], f"{name} data sheet, dense {str(dtype).removeprefix('torch.')}"
    return matmul_peak(device, dtype), f"measured {str(dtype).removeprefix('torch.')} matmul"
