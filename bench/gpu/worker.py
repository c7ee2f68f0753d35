"""A process of its own that measures entries, so that a broken device, a crash or a hang costs one entry only."""

import gc
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection

import torch

from bench.gpu.measure import Patience, Record, measure, not_measured, reason
from bench.gpu.plan import CONTENDERS, Entry
from bench.gpu.stopwatch import EventStopwatch, Stopwatch, WallStopwatch

_START = 45.0  # seconds that a new process may take beyond an entry's own
DTYPE = torch.bfloat16


def measure_entry(
    entry: Entry,
    device: torch.device,
    stopwatch: Stopwatch,
    patience: Patience,
    deadline: float,
    note: Callable[[Record], None] = lambda record: None,
) -> Record:
    """The record of an entry; where memory does not suffice, of half the batch."""
    batch = entry.batch
    while True:
        try:
            return _measure_batch(entry, batch, device, stopwatch, patience, deadline, note)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        batch //= 2  # out here, where the error no longer holds the tensors
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()


def _measure_batch(
    entry: Entry,
    batch: int,
    device: torch.device,
    stopwatch: Stopwatch,
    patience: Patience,
    deadline: float,
    note: Callable[[Record], None],
) -> Record:
    contest = entry.contest(batch, device, DTYPE)
    figures = {"batch": batch, "flops": contest.flops, "bytes": contest.bytes, "images": batch}

    def record(contenders: dict[str, Record]) -> Record:
        measured = any(c["state"] == "measured" for c in contenders.values())
        state = {"state": "measured"} if measured else not_measured("no contender was timed")
        return {**state, **figures, "contest": contest.name, "contenders": contenders}

    names = CONTENDERS[entry.part]
    return record(measure(contest, names, stopwatch, patience, deadline, lambda c: note(record(c))))


def answer(
    entry: Entry,
    device: torch.device,
    stopwatch: Stopwatch,
    patience: Patience,
    deadline: float,
    send: Callable[[tuple[str, object]], None],
) -> None:
    """Send ("so far", record) as an entry's record grows, and at the end ("done", record) or ("raised", reason)."""
    try:
        result = measure_entry(entry, device, stopwatch, patience, deadline, lambda r: send(("so far", r)))
    except Exception as error:
        send(("raised", reason(error)))
    else:
        send(("done", result))


def _serve(connection: Connection, dry_run: bool) -> None:
    """Measure the entries that come, until the other end is closed."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False  # the truth is float32
    torch.backends.cudnn.benchmark = True  # every contender gets the library's fastest convolutions
    if dry_run:
        torch.compiler.set_stance("force_eager")
        device, patience = torch.device("cpu"), Patience(passes=2, seconds=0.0, calls=(1, 1))
        stopwatch: Stopwatch = WallStopwatch()
    else:
        device, patience = torch.device("cuda"), Patience()
        stopwatch = EventStopwatch(device)
    while True:
        try:
            entry, seconds = connection.recv()
        except EOFError:
            return
        answer(entry, device, stopwatch, patience, time.monotonic() + seconds, connection.send)
        gc.collect()
        torch.cuda.empty_cache()


class Worker:
    """Hands entries to a process, which is started when it is needed and replaced when it fails."""

    def __init__(self, dry_run: bool) -> None:
        self._dry_run = dry_run
        self._process = self._connection = None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        if self._process is not None:
            self._connection.close()
            self._process.kill()
            self._process.join()
            self._process = self._connection = None

    def measure(self, entry: Entry, seconds: float, left: float) -> Record:
        """The entry's record. It may take `seconds`; after the half more, or what is `left` of the run, it is ended."""
        hard = 1.5 * seconds + (_START if self._process is None else 0.0)
        end = time.monotonic() + min(hard, left)
        if self._process is None:
            self._start()
        last: Record = {}
        try:
            self._connection.send((entry, min(seconds, left)))
            while True:
                if not self._connection.poll(max(0.0, end - time.monotonic())):
                    return self._failed(last, f"stopped after {min(hard, left):.0f} s")
                kind, value = self._connection.recv()
                if kind == "done":
                    return value
                if kind == "raised":
                    return self._failed(last, value)
                last = value
        except (EOFError, OSError):
            self._process.join()
            return self._failed(last, f"the process ended with code {self._process.exitcode}")

    def _failed(self, last: Record, reason: str) -> Record:
        """What was known of an entry when its process failed, which is ended."""
        self.stop()
        contenders = {
            name: {**c, "reason": reason} if c["state"] == "not measured" else c
            for name, c in last.get("contenders", {}).items()
        }
        state = {} if last.get("state") == "measured" else not_measured(reason)
        return {**last, **state, "contenders": contenders, "failure": reason}

    def _start(self) -> None:
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._dry_run))
        self._process.start()
        theirs.close()
