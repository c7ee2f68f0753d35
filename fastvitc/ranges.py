"""The range of a number stands beside it, as in `epochs: Annotated[int, at_least(1)]`; one function checks them all."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from math import inf
from typing import Any, get_type_hints

from fastvitc.errors import UsageError


class Rule(ABC):
    """Says whether a value is as it must be; its text says how that is."""

    @abstractmethod
    def holds(self, value: Any) -> bool:
        """Whether it is."""


@dataclass(frozen=True)
class Range(Rule):
    """Finite numbers from `low` to `high`, without `low` itself if `above`, without `high` itself if `below`.

    Of a tuple each number must be inside.
    """

    low: float
    high: float = inf
    above: bool = False
    below: bool = False

    def holds(self, value: Any) -> bool:
        return all(map(self._inside, value if isinstance(value, tuple) else (value,)))

    def _inside(self, number: float) -> bool:
        least = number > self.low if self.above else number >= self.low
        most = number < self.high if self.below else number <= self.high
        return least and most and number < inf

    def __str__(self) -> str:
        if self.high == inf:
            return f"above {self.low:g}" if self.above else f"at least {self.low:g}"
        if self.below:
            return f"at least {self.low:g} and below {self.high:g}"
        if self.above:
            return f"above {self.low:g} and at most {self.high:g}"
        return f"from {self.low:g} to {self.high:g}"


class Ascending(Rule):
    """A pair whose first number is not larger than the second."""

    def holds(self, value: tuple[float, ...]) -> bool:
        return all(a <= b for a, b in pairwise(value))

    def __str__(self) -> str:
        return "the smaller number first"


class OneOrTwo(Rule):
    """One number or two."""

    def holds(self, value: tuple[float, ...]) -> bool:
        return len(value) in (1, 2)

    def __str__(self) -> str:
        return "one or two numbers"


def at_least(low: float) -> Range:
    """Numbers from `low` on."""
    return Range(low)


def above(low: float) -> Range:
    """Numbers over `low`."""
    return Range(low, above=True)


def share(*, zero: bool = True, one: bool = True) -> Range:
    """Numbers from 0 to 1; without `zero` those above 0, without `one` those below 1."""
    return Range(0, 1, above=not zero, below=not one)


def check_ranges(settings: object, *, flags: bool = False) -> None:
    """Raise UsageError for the first field of a dataclass that breaks a rule in its annotation.

    None breaks no rule. With `flags` the message names the field as a command-line flag.
    """
    for name, hint in get_type_hints(type(settings), include_extras=True).items():
        value = getattr(settings, name)
        for rule in getattr(hint, "__metadata__", ()):
            if isinstance(rule, Rule) and value is not None and not rule.holds(value):
                field = f"--{name.replace('_', '-')}" if flags else name
                shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
                raise UsageError(f"{field} must be {rule}, got {shown}")
