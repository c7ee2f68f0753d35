"""What Linux says of the CPU."""

import platform
from pathlib import Path

_INFO = Path("/proc/cpuinfo")


def _field(*names: str) -> str | None:
    """The first line of that name of the first core; None on other systems."""
    lines = _INFO.read_text().splitlines() if _INFO.exists() else []
    fields = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in fields if name.strip() in names), None)


def cpu_name() -> str:
    """The CPU's name."""
    return _field("model name") or platform.processor() or platform.machine()


def cpu_flags() -> set[str]:
    """The CPU's features as Linux names them for its architecture; empty elsewhere."""
    return set((_field("flags", "Features") or "").split())
