"""Whether a run's numbers are finite, and which steps spoilt them. Steps are counted from the run's begin, from 0."""

import torch
from torch import Tensor, nn

from fastvitc.training.process import Process

_NEVER = torch.iinfo(torch.int64).max


class NotFinite(Exception):
    """A loss or a weight is not finite.

    Attributes:
        what: in words.
        step: the first step that the numbers spoilt: its loss is not finite, or it would have begun with such weights.
    """

    def __init__(self, what: str, step: int) -> None:
        super().__init__(what)
        self.what, self.step = what, step

    def window(self, length: int) -> range:
        """The last `length` steps up to the first bad one: the update before it may have done it."""
        return range(max(0, self.step - length + 1), self.step + 1)


class Watch:
    """Notes on the device, which nothing waits for, the first step whose loss is not finite."""

    def __init__(self) -> None:
        self._first: Tensor | None = None

    def add(self, step: int, loss: Tensor) -> None:
        """Look at the loss of a step, a 0-d tensor."""
        first = torch.where(loss.isfinite(), _NEVER, step)
        self._first = first if self._first is None else torch.minimum(self._first, first)

    def check(self, model: nn.Module, done: int, process: Process) -> None:
        """Wait for the device and look at all losses so far and at the weights after `done` steps.

        The loss is of the weights before the last update; the update may have spoilt them.

        Raises:
            NotFinite: on every process, where one found something.
        """
        first = _NEVER if self._first is None else int(self._first)
        spoilt = [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]
        found = process.gather((first, spoilt))
        first = min(step for step, _ in found)
        if first != _NEVER:
            raise NotFinite("the training loss became infinite or not a number", first)
        everywhere = sorted({name for _, names in found for name in names})
        if everywhere:
            raise NotFinite(f"{everywhere[0]} became infinite or not a number", done)
