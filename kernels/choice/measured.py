"""Which backend was measured fastest on each device: a file in the user's cache, read once per process."""

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fastvitc.files import cache_folder, locked, write_atomically
from fastvitc.kernels.cpu.cpuinfo import cpu_name


@dataclass(frozen=True)
class Measured:
    """The backends of one op as measured on one device.

    `milliseconds` maps each candidate to its median forward and backward, None where it could not run, was wrong, or
    was the only one. `subject` says what was measured: model, batch_size, dtype, image_size, compile.
    """

    backend: str
    milliseconds: dict[str, float | None]
    subject: dict[str, Any]


#: {dtype: {op: measurement}} of a device.
_ByDtype = dict[str, dict[str, Measured]]

_known: dict[str, _ByDtype] = {}


def choices_file() -> Path:
    """Where the measured choices are kept."""
    return cache_folder() / "backends.json"


def measured(device: torch.device, dtype: torch.dtype | None = None) -> dict[str, Measured]:
    """{op: its measurement} on this device with these versions of PyTorch and Triton; empty where there is none.

    `dtype` is that of the op's arithmetic; without one, the op's last measurement in any dtype.
    """
    if device.type == "cuda" and not torch.cuda.is_available():  # kernels compiled ahead of time
        return {}
    place = _place(device)
    if place not in _known:
        _known[place] = _read(choices_file()).get(_key(device), {})
    if dtype is not None:
        return _known[place].get(_name(dtype), {})
    return {op: result for ops in _known[place].values() for op, result in ops.items()}


def record(device: torch.device, dtype: torch.dtype, results: Mapping[str, Measured]) -> None:
    """Put measurements into the file, beside those of other devices, dtypes and ops; warns where it cannot."""
    path = choices_file()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with locked(path.with_suffix(".lock")):  # what another process measures meanwhile is not lost
            text = _merged(path, device, dtype, results)
            write_atomically(path, lambda temporary: temporary.write_text(text))
    except OSError as error:
        _add(_known.setdefault(_place(device), {}), dtype, results)
        warnings.warn(
            f"cannot write the measured backends to {path} ({error.strerror}); they hold for this process. "
            "Set FASTVITC_CACHE to a writable folder",
            stacklevel=2,
        )


def _merged(path: Path, device: torch.device, dtype: torch.dtype, results: Mapping[str, Measured]) -> str:
    """The file's text with new measurements, which this process knows from now on."""
    if path.exists():
        path.read_bytes()  # a passing failure must not look like a file without measurements
    entries = _read(path)
    here = entries.setdefault(_key(device), {})
    _add(here, dtype, results)
    _known[_place(device)] = here
    plain = {
        k: {d: {op: asdict(result) for op, result in ops.items()} for d, ops in by_dtype.items()}
        for k, by_dtype in entries.items()
    }
    return json.dumps(plain, indent=2) + "\n"


def _add(here: _ByDtype, dtype: torch.dtype, results: Mapping[str, Measured]) -> None:
    here[_name(dtype)] = {**here.pop(_name(dtype), {}), **results}  # the last measured comes last


def _read(path: Path) -> dict[str, _ByDtype]:
    if not path.exists():
        return {}
    try:
        entries = json.loads(path.read_text())
        return {
            k: {d: {op: _parsed(entry) for op, entry in ops.items()} for d, ops in by_dtype.items()}
            for k, by_dtype in entries.items()
        }
    except (OSError, ValueError, TypeError, AttributeError) as error:
        warnings.warn(
            f"cannot read the measured backends in {path} ({error}); the fixed order holds. "
            "Run fastvitc-tune to measure again, or delete the file",
            stacklevel=2,
        )
        return {}


def _parsed(entry: dict[str, Any]) -> Measured:
    result = Measured(**entry)
    if not isinstance(result.backend, str) or not isinstance(result.milliseconds, dict):
        raise TypeError(f"not a measurement: {entry}")
    return result


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _place(device: torch.device) -> str:
    """The device's name in this process: cheaper than its own."""
    if device.type != "cuda":
        return device.type
    return f"cuda:{torch.cuda.current_device() if device.index is None else device.index}"


def _key(device: torch.device) -> str:
    name = f"cpu: {cpu_name()}" if device.type == "cpu" else device.type
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "not installed"
    return f"{name}, torch {torch.__version__}, triton {triton}"
