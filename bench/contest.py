"""A contest: several ways to compute the same thing, checked against one truth and then timed in alternation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

CONVENTION = "FLOPs: a multiply-add is two; training is 3 x forward"


class Candidate(NamedTuple):
    """`run` is timed; `tensors` gives, by the same code, what is compared with the truth."""

    run: Callable[[], object]
    tensors: Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Contest:
    """One benchmark group.

    Attributes:
        name: what is computed, with shapes and dtype.
        truth: computes the expected tensors in float32 with the reference backend; empty where nothing is compared.
        contenders: name → a function that builds the candidate; ours start with "fastvitc".
        flops: floating-point operations of a call (a multiply-add is two), 0 where only bytes count.
        bytes: bytes that a call has to move at least, 0 where they are not counted.
        images: images per call, 0 where a rate of images says nothing.
        tolerance: largest allowed error of a tensor in the Euclidean norm, relative to the truth's.
    """

    name: str
    truth: Callable[[], Sequence[Tensor]] = field(repr=False)
    contenders: dict[str, Callable[[], Candidate]] = field(repr=False)
    flops: float = 0
    bytes: float = 0
    images: int = 0
    tolerance: float = 2e-2


class ParityError(AssertionError):
    """A contender computes something else than the reference; it is not timed."""


@dataclass
class Arena:
    """Holds the built contenders of the contest at hand, so that passes alternate between warm calls."""

    _contest: Contest | None = None
    _truth: list[Tensor] = field(default_factory=list)
    _built: dict[str, tuple[Callable[[], object], float]] = field(default_factory=dict)

    def open(self, contest: Contest) -> None:
        """Leave the contest before, if it is another, and compute the truth of this one."""
        if contest is not self._contest:
            self._built.clear()
            torch.compiler.reset()
            self._contest, self._truth = contest, [t.detach().double() for t in contest.truth()]

    def enter(self, contest: Contest, contender: str) -> tuple[Callable[[], object], float]:
        """What to time of the contender and its parity error; ParityError where that is over the tolerance."""
        self.open(contest)
        if contender not in self._built:
            candidate = contest.contenders[contender]()
            self._built[contender] = candidate.run, self._error(contest, contender, candidate.tensors())
        return self._built[contender]

    def _error(self, contest: Contest, contender: str, found: Sequence[Tensor]) -> float:
        if len(found) != len(self._truth):
            raise ParityError(f"{contest.name}: {contender} gives {len(found)} of {len(self._truth)} tensors")
        worst = 0.0
        for i, (expected, tensor) in enumerate(zip(self._truth, found, strict=True)):
            if expected.shape != tensor.shape:
                raise ParityError(
                    f"{contest.name}: {contender} gives shape {tuple(tensor.shape)} for tensor {i}"
                )
            scale = expected.norm().clamp(min=1e-30)
            error = ((tensor.detach().double() - expected).norm() / scale).item()
            if not error <= contest.tolerance:
                raise ParityError(
                    f"{contest.name}: {contender} is off by {error:.2e} of the norm of tensor {i}, allowed are "
                    f"{contest.tolerance:.0e}; it is not timed"
                )
            worst = max(worst, error)
        return worst
