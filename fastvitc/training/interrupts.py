"""How a run is asked to stop: SIGTERM and SIGUSR1 from a scheduler, Ctrl-C from a person."""

import signal
from types import FrameType

from fastvitc.errors import Interrupted

_STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Interrupts:
    """While it is entered, a first signal is only remembered; a second Ctrl-C ends the program at once."""

    def __init__(self) -> None:
        self._received: int | None = None
        self._interrupted = False
        self._before: dict[int, object] = {}

    @property
    def received(self) -> bool:
        """Whether the run was asked to stop."""
        return self._received is not None

    def error(self, saved: str) -> Interrupted:
        """The exception that ends the run; `saved` says where its state is. Any process may have had the signal."""
        name = "another process's signal" if self._received is None else signal.Signals(self._received).name
        code = 130 if self._received == signal.SIGINT else 75
        return Interrupted(f"stopped by {name}; {saved}", code)

    def __enter__(self) -> "Interrupts":
        self._before = {number: signal.signal(number, self._remember) for number in _STOPPING}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _remember(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = self._interrupted or number == signal.SIGINT
        self._received = self._received or number
