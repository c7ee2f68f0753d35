"""Which implementation of an op runs: the table of backends, and the one rule that chooses among them.

An explicit backend is used or raises `BackendUnavailable`; it never falls back. `backend="auto"` takes the first
backend in the op's order for the device that is available here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch


class BackendUnavailable(RuntimeError):
    """An explicitly requested backend cannot run here; the message says why and what can."""


@dataclass(frozen=True)
class Backends:
    """The backends of one op.

    `order` lists, per device type, the backends from the most to the least preferred; the key "default" serves
    every other device. `rooms` maps a backend to its module in the op's folder, imported when it is first used.
    `obstacle` maps a backend to a function of the device type that returns why it cannot run there, or None when it
    can; a backend without an entry runs everywhere.
    """

    op: str
    order: Mapping[str, Sequence[str]]
    rooms: Mapping[str, str]
    obstacle: Mapping[str, Callable[[str], str | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _OPS[self.op] = self

    def room(self, backend: str) -> ModuleType:
        """The module that implements a backend."""
        return import_module(f"fastvitc.kernels.{self.op}.{self.rooms[backend]}")

    def why_not(self, backend: str, device_type: str) -> str | None:
        """Why `backend` cannot run on `device_type`, or None when it can."""
        if backend not in self.rooms:
            return f"{self.op} has no backend {backend!r} (it has {', '.join(self.rooms)})"
        check = self.obstacle.get(backend)
        return check(device_type) if check else None

    def resolve(self, requested: str, device_type: str) -> str:
        """The name of the backend to run for a request on a device; BackendUnavailable when there is none."""
        if requested != "auto":
            reason = self.why_not(requested, device_type)
            if reason is not None:
                usable = [b for b in self.rooms if self.why_not(b, device_type) is None]
                raise BackendUnavailable(
                    f"{self.op}: backend {requested!r} is not available on {device_type}: {reason}; "
                    f"usable here: auto, {', '.join(usable)}"
                )
            return requested
        order = self.order.get(device_type, self.order["default"])
        return next(b for b in order if self.why_not(b, device_type) is None)


def no_triton(device_type: str) -> str | None:
    """Why Triton kernels cannot run on a device type, None when they can."""
    if find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if device_type == "cuda":
        return None
    from fastvitc.kernels._triton import INTERPRET  # imports Triton

    if device_type == "cpu" and INTERPRET:
        return None
    return "Triton kernels need a GPU (or, to test them slowly on a CPU, TRITON_INTERPRET=1)"


_OPS: dict[str, Backends] = {}


@torch.compiler.assume_constant_result
def resolve(op: str, requested: str, device_type: str) -> str:
    """`Backends.resolve` by the op's name; a constant to torch.compile."""
    return _OPS[op].resolve(requested, device_type)


def chosen(device: str | torch.device = "cpu", backend: str = "auto") -> dict[str, str]:
    """The backend that each op takes on a device: {op: backend}; BackendUnavailable where an op cannot run as asked."""
    kind = torch.device(device).type
    return {name: op.resolve(backend, kind) for name, op in _OPS.items()}


def availability(device: str | torch.device = "cpu") -> dict[str, dict[str, str | None]]:
    """{op: {backend: None where it can run on the device, else the reason why not}}."""
    kind = torch.device(device).type
    return {name: {b: op.why_not(b, kind) for b in op.rooms} for name, op in _OPS.items()}
