import time

import pytest
import torch
from gpu_contests import CPU, PATIENCE, candidate, contest, failing

from bench.gpu import worker
from bench.gpu.plan import CONTENDERS, Entry
from bench.gpu.stopwatch import WallStopwatch


class Made(Entry):
    """An entry whose contest is made by a function of the batch."""

    def contest(self, batch, device, dtype):
        return MAKES[self.model](batch)


MAKES = {}


def answers(make, batch=8):
    MAKES["made"] = make
    sent = []
    end = time.monotonic() + 60
    worker.answer(Made("attention", "made", True, batch), CPU, WallStopwatch(), PATIENCE, end, sent.append)
    return sent


def test_the_batch_is_halved_until_it_fits(monkeypatch):
    monkeypatch.setitem(CONTENDERS, "attention", ("a",))
    error = torch.OutOfMemoryError("CUDA out of memory")
    kind, record = answers(lambda batch: contest({"a": failing(error) if batch > 2 else candidate()}))[-1]
    assert (kind, record["state"], record["batch"], record["images"]) == ("done", "measured", 2, 2)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (failing(), "RuntimeError: no such instruction"),
        (lambda batch: contest({}, truth=failing()), "RuntimeError: no such instruction"),
        (lambda batch: contest({}, truth=failing(torch.OutOfMemoryError("full"))), "OutOfMemoryError: full"),
    ],
)
def test_an_entry_that_cannot_be_made_is_answered_with_its_error(make, reason):
    assert answers(lambda batch: make(batch) if make.__code__.co_argcount else make())[-1] == (
        "raised",
        reason,
    )


def test_a_process_that_ends_or_hangs_costs_its_entry_only(monkeypatch):
    class Connection:
        """Gives the messages of a process in turn; None is its end, and past the last it hangs."""

        def __init__(self, *messages):
            self.messages = list(messages)

        def send(self, request):
            pass

        def poll(self, seconds):
            return bool(self.messages)

        def recv(self):
            message = self.messages.pop(0)
            if message is None:
                raise EOFError
            return message

        def close(self):
            pass

    class Process:
        exitcode = -11

        def join(self):
            pass

        kill = join

    first = {
        "state": "measured",
        "contenders": {"a": {"state": "measured"}, "b": {"state": "not measured", "reason": ""}},
    }
    done = {"state": "measured", "contenders": {}}
    lives = [
        Connection(("so far", first), None),
        Connection(),
        Connection(("raised", "no")),
        Connection(("done", done)),
    ]

    def start(self):
        self._process, self._connection = Process(), lives.pop(0)

    monkeypatch.setattr(worker.Worker, "_start", start)
    entry = Entry("attention", "vitc_1gf", True, 4)
    with worker.Worker(dry_run=True) as measurer:
        crashed, hung, raised, fine = (measurer.measure(entry, 1.0, 60.0) for _ in range(4))
    assert crashed["failure"] == "the process ended with code -11"
    assert crashed["state"] == "measured"
    assert crashed["contenders"]["b"] == {"state": "not measured", "reason": crashed["failure"]}
    assert (hung["state"], hung["reason"]) == ("not measured", "stopped after 46 s")
    assert (raised["state"], raised["reason"]) == ("not measured", "no")
    assert fine == done
