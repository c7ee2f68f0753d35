"""A trace of a few training steps, for chrome://tracing or ui.perfetto.dev."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from fastvitc.files import write_atomically

_BEFORE = 3  # steps: they compile and fill caches


class Profile:
    """Traces some steps after the first few, and writes the trace when they are done.

    Args:
        steps: how many are traced.
        path: of the trace, JSON of Chrome's trace events.
    """

    def __init__(self, steps: int, path: Path) -> None:
        self._path, self._left = path, _BEFORE + steps
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=_BEFORE - 1, warmup=1, active=steps, repeat=1),
            on_trace_ready=self._write,
            acc_events=True,
        )
        self._profile.start()

    def step(self) -> bool:
        """A step is done; whether the trace has just been written."""
        if not self._left:
            return False
        self._left -= 1
        self._profile.step()
        if not self._left:
            self._profile.stop()
        return not self._left

    def close(self) -> bool:
        """Whether the steps were too few; then there is no trace."""
        too_few, self._left = bool(self._left), 0
        if too_few:
            self._profile.on_trace_ready = None
            self._profile.stop()
        return too_few

    def _write(self, traced: profile) -> None:
        write_atomically(self._path, lambda path: traced.export_chrome_trace(str(path)))
