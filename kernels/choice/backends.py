"""Which implementation of an op runs: the table of backends, and the one rule that chooses among them.

An explicit backend is used or raises `BackendUnavailable`; it never falls back. `backend="auto"` takes the backend that
`fastvitc-tune` measured fastest on the device where that can run, else the first in the op's order that can.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch

from fastvitc.errors import UsageError
from fastvitc.kernels.choice.checks import takes
from fastvitc.kernels.choice.measured import measured

#: A backend for every op that has it, or {op: backend} with "auto" for the ops left out, also as text:
#: "op=backend,op=backend".
Choice = str | Mapping[str, str]


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

    def _ordered(self, device_type: str) -> Iterator[str]:
        """The backends that can run on `device_type`, the preferred ones first, each asked when its turn comes."""
        order = self.order.get(device_type, self.order["default"])
        return (b for b in dict.fromkeys((*order, *self.rooms)) if self.why_not(b, device_type) is None)

    def usable(self, device_type: str) -> list[str]:
        """The backends that can run on `device_type`, the preferred ones first."""
        return list(self._ordered(device_type))

    def resolve(self, requested: str, device: torch.device, dtype: torch.dtype | None = None) -> str:
        """The name of the backend to run for a request on a device; BackendUnavailable when there is none.

        `dtype` is that of the op's arithmetic; without one, auto takes what was last measured in any.
        """
        if requested != "auto":
            reason = self.why_not(requested, device.type)
            if reason is not None:
                raise BackendUnavailable(
                    f"{self.op}: backend {requested!r} is not available on {device.type}: {reason}; "
                    f"usable here: auto, {', '.join(self.usable(device.type))}"
                )
            return requested
        fastest = measured(device, dtype).get(self.op)
        if fastest is not None and self.why_not(fastest.backend, device.type) is None:
            return fastest.backend
        return next(b for b in self._ordered(device.type) if takes(b, dtype))


def no_triton(device_type: str) -> str | None:
    """Why Triton kernels cannot run on a device type, None when they can."""
    if find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if device_type == "cuda":
        return None
    from fastvitc.kernels.gpu.triton import INTERPRET  # imports Triton

    if device_type == "cpu" and INTERPRET:
        return None
    return "Triton kernels need a GPU (or, to test them slowly on a CPU, TRITON_INTERPRET=1)"


_OPS: dict[str, Backends] = {}


def requested(op: str, backend: Choice) -> str:
    """The backend that a model's choice names for one op; "auto" for an op without a backend that others have.

    Raises:
        UsageError: the choice is neither a name nor {op: name}, or names an op that there is not.
    """
    if isinstance(backend, str):
        if "=" not in backend:
            elsewhere = any(backend in other.rooms for other in _OPS.values())
            return "auto" if elsewhere and backend not in _OPS[op].rooms else backend
        parts = (part.partition("=") for part in backend.split(","))
        backend = {name.strip(): choice.strip() for name, _, choice in parts}
    if not isinstance(backend, Mapping) or not all(isinstance(name, str) for name in backend.values()):
        raise UsageError(f"backend must be a name or a mapping {{op: name}}, got {backend!r}")
    unknown = [name for name in backend if name not in _OPS]
    if unknown:
        raise UsageError(
            f"backend names the op {unknown[0]!r}, which there is not; the ops are {', '.join(_OPS)}"
        )
    return backend.get(op, "auto")


@torch.compiler.assume_constant_result
def resolve(op: str, backend: Choice, device_type: str, dtype: torch.dtype | None = None) -> str:
    """`Backends.resolve` by the op's name, on the current device of a type; a constant to torch.compile."""
    name = backend if isinstance(backend, str) and "=" not in backend else requested(op, backend)
    return _OPS[op].resolve(name, torch.device(device_type), dtype)


def chosen(
    device: str | torch.device = "cpu", backend: Choice = "auto", dtype: torch.dtype | None = None
) -> dict[str, str]:
    """The backend that each op takes on a device: {op: backend}.

    Args:
        device: whose backends.
        backend: one name for every op that has it, or {op: name} with "auto" for the ops left out, or that as text
            "op=name,op=name".
        dtype: of the ops' arithmetic; without one, auto takes what was last measured in any.

    Raises:
        BackendUnavailable: an op cannot run as asked.
        UsageError: the mapping names an op that there is not.
    """
    place = torch.device(device)
    return {name: op.resolve(requested(name, backend), place, dtype) for name, op in _OPS.items()}


def candidates(device: str | torch.device = "cpu") -> dict[str, list[str]]:
    """{op: the backends to choose among on the device, the preferred ones first}; the reference is none of them."""
    kind = torch.device(device).type
    return {name: [b for b in op.usable(kind) if b != "reference"] for name, op in _OPS.items()}


def availability(device: str | torch.device = "cpu") -> dict[str, dict[str, str | None]]:
    """{op: {backend: None where it can run on the device, else the reason why not}}."""
    kind = torch.device(device).type
    return {name: {b: op.why_not(b, kind) for b in op.rooms} for name, op in _OPS.items()}
