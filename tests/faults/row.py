"""What a row of the table is, and what it gives."""

from collections.abc import Callable
from dataclasses import dataclass

from .place import Place

_SHOWN = 5  # failures


class NotRun(Exception):
    """A row cannot be run on this machine; the message says why."""


@dataclass(frozen=True)
class Outcome:
    """What a row found.

    Attributes:
        trials: how many were made.
        found: what was counted or measured, in words; it counts where nothing failed.
        failures: what did not hold, one line each.
    """

    trials: int
    found: str
    failures: tuple[str, ...] = ()

    @property
    def held(self) -> bool:
        return not self.failures

    @property
    def words(self) -> str:
        """It in one line: what was found where the claim held, else what did not hold."""
        if self.held:
            return self.found
        more = f" and {len(self.failures) - _SHOWN} more" if len(self.failures) > _SHOWN else ""
        return " ".join(f"did not hold: {'; '.join(self.failures[:_SHOWN])}{more}".split())


@dataclass(frozen=True)
class Row:
    """A claim, and how it is tried.

    Attributes:
        name: as `--rows` takes it.
        claim: one sentence.
        check: tries the claim so many times.
        trials: of the full mode.
        mounts: whether it mounts file systems or makes networks, which needs rights of its own.
        warm: in the full mode too its runs begin in forked processes: there are many.
    """

    name: str
    claim: str
    check: Callable[[Place, int], Outcome]
    trials: int
    mounts: bool = False
    warm: bool = False
