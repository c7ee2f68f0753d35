"""Which implementation of an op runs: the table of backends, and the one rule that chooses among them.

An explicit backend is used or raises `BackendUnavailable`; it never falls back. `backend="auto"` takes the backend that
`fastvitc-tune` measured fastest on the device where that can run, else the first in the op's order that can.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
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

    Attributes:
        op: its name, which is that of its folder.
        order: device type → backends from the most to the least preferred; "default" serves every other device.
        modules: backend → its module in the op's folder, imported when it is first used.
        unavailable: backend → a function of the device type: why it cannot run there, or None where it can. A backend
            without an entry runs everywhere.
        refuses: backend → a function of device type, dtype and what else the op passes on about its input: why the
            backend does not take it, or None where it does. "torch" refuses nothing.
        sharing: backends that share statistics over processes.
    """

    op: str
    order: Mapping[str, Sequence[str]]
    modules: Mapping[str, str]
    unavailable: Mapping[str, Callable[[str], str | None]] = field(default_factory=dict)
    refuses: Mapping[str, Callable[..., str | None]] = field(default_factory=dict)
    sharing: Sequence[str] = ()

    def __post_init__(self) -> None:
        _OPS[self.op] = self

    def module(self, backend: str) -> ModuleType:
        """What implements a backend."""
        return import_module(f"fastvitc.kernels.{self.op}.{self.modules[backend]}")

    def why_not(self, backend: str, device_type: str) -> str | None:
        """Why `backend` cannot run on `device_type`, or None when it can."""
        if backend not in self.modules:
            return f"{self.op} has no backend {backend!r} (it has {', '.join(self.modules)})"
        check = self.unavailable.get(backend)
        return check(device_type) if check else None

    def ordered(self, device_type: str) -> list[str]:
        """All backends, those preferred on `device_type` first."""
        return list(dict.fromkeys((*self.order.get(device_type, self.order["default"]), *self.modules)))

    def _usable(self, device_type: str) -> Iterator[str]:
        """The backends that can run on `device_type`, the preferred ones first, each asked when its turn comes."""
        return (b for b in self.ordered(device_type) if self.why_not(b, device_type) is None)

    def resolve(
        self,
        asked: str,
        device: torch.device,
        dtype: torch.dtype | None = None,
        *,
        sharing: bool = False,
        traits: Sequence[object] | None = None,
    ) -> str:
        """The name of the backend to run on a device; BackendUnavailable when there is none.

        Args:
            asked: "auto" or the name of a backend.
            device: where it runs.
            dtype: of the op's arithmetic; without one, auto takes what was last measured in any.
            sharing: whether statistics are shared over processes.
            traits: of the input, for `refuses`; without them no backend is asked.
        """
        name = self._explicit(asked, device.type, sharing) if asked != "auto" else None
        name = name or self._automatic(device, dtype, sharing)
        if traits is None or name not in self.refuses:
            return name
        reason = self.refuses[name](device.type, dtype, *traits)
        if reason is None:
            return name
        if asked == "auto":
            return "torch"
        raise BackendUnavailable(f"{self.op}: backend {name!r} cannot run: {reason}; use the backend torch")

    def _explicit(self, name: str, device_type: str, sharing: bool) -> str:
        if sharing and name not in self.sharing:
            raise BackendUnavailable(
                f"{self.op}: backend {name!r} does not share statistics over processes; usable: auto, "
                f"{', '.join(self.sharing)}"
            )
        reason = self.why_not(name, device_type)
        if reason is not None:
            raise BackendUnavailable(
                f"{self.op}: backend {name!r} is not available on {device_type}: {reason}; "
                f"usable here: auto, {', '.join(self._usable(device_type))}"
            )
        return name

    def _automatic(self, device: torch.device, dtype: torch.dtype | None, sharing: bool) -> str:
        def fits(name: str) -> bool:
            return not sharing or name in self.sharing

        fastest = measured(device, dtype).get(self.op)
        if (
            fastest is not None
            and fits(fastest.backend)
            and self.why_not(fastest.backend, device.type) is None
        ):
            return fastest.backend
        return next(b for b in self._usable(device.type) if fits(b) and takes(b, dtype))


_OPS: dict[str, Backends] = {}


def parsed(backend: Choice) -> dict[str, str]:
    """{op: the name that a choice gives it}, for every op.

    A single name goes to the ops that have it and "auto" to the others. A name that no op has goes to all of them, and
    fails where it is used.

    Raises:
        UsageError: the choice is neither a name nor {op: name}, or names an op that does not exist.
    """
    if isinstance(backend, str) and "=" not in backend:
        known = any(backend in op.modules for op in _OPS.values())
        return {name: "auto" if known and backend not in op.modules else backend for name, op in _OPS.items()}
    if isinstance(backend, str):
        parts = (part.partition("=") for part in backend.split(","))
        backend = {name.strip(): choice.strip() for name, _, choice in parts}
    if not isinstance(backend, Mapping) or not all(isinstance(name, str) for name in backend.values()):
        raise UsageError(f"backend must be a name or a mapping {{op: name}}, got {backend!r}")
    unknown = [name for name in backend if name not in _OPS]
    if unknown:
        raise UsageError(
            f"backend names the op {unknown[0]!r}, which there is not; the ops are {', '.join(_OPS)}"
        )
    return {name: backend.get(name, "auto") for name in _OPS}


@torch.compiler.assume_constant_result
def resolve(
    op: str,
    backend: Choice,
    device_type: str,
    dtype: torch.dtype | None = None,
    sharing: bool = False,
    traits: tuple[object, ...] | None = None,
) -> str:
    """`Backends.resolve` by the op's name, on the current device of a type; a constant to torch.compile.

    A single name is this op's alone, so one that the op does not have is refused.
    """
    name = backend if isinstance(backend, str) and "=" not in backend else parsed(backend)[op]
    return _OPS[op].resolve(name, torch.device(device_type), dtype, sharing=sharing, traits=traits)


def chosen(
    device: str | torch.device = "cpu",
    backend: Choice = "auto",
    dtype: torch.dtype | None = None,
    *,
    sharing: bool = False,
) -> dict[str, str]:
    """The backend that each op takes on a device: {op: backend}.

    Args:
        device: whose backends.
        backend: one name for every op that has it, or {op: name} with "auto" for the ops left out, or that as text
            "op=name,op=name".
        dtype: of the ops' arithmetic; without one, auto takes what was last measured in any.
        sharing: whether the ops that have statistics are to share them over processes.

    Raises:
        BackendUnavailable: an op cannot run as asked.
        UsageError: the mapping names an op that does not exist.
    """
    place = torch.device(device)
    return {
        op: _OPS[op].resolve(name, place, dtype, sharing=sharing and bool(_OPS[op].sharing))
        for op, name in parsed(backend).items()
    }


def availability(device: str | torch.device = "cpu") -> dict[str, dict[str, str | None]]:
    """{op: {backend: None where it can run on the device, else the reason why not}}, the preferred ones first."""
    kind = torch.device(device).type
    return {name: {b: op.why_not(b, kind) for b in op.ordered(kind)} for name, op in _OPS.items()}
