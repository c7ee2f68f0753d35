"""A run's folder: held by one run at a time, written by one thread beside the training."""

import fcntl
import queue
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from fastvitc.errors import FastvitcError, UsageError
from fastvitc.files import remove_unfinished, write_atomically
from fastvitc.models.saved import save_weights
from fastvitc.models.vit import VisionTransformer
from fastvitc.training.state import CHECKPOINTS, RunState, on_host, state_files


class RunFolder:
    """Makes the folder, or takes it over from a run that has ended.

    Args:
        path: of the folder.
        keep: how many states are kept, the newest.

    Raises:
        FastvitcError: it cannot be written, or another run holds it.
    """

    def __init__(self, path: Path, keep: int) -> None:
        self.path, self._keep = path, keep
        try:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
            self._lock = (path / ".lock").open("w")
        except OSError as error:
            raise FastvitcError(
                f"cannot write to the output folder {path} ({error.strerror}); choose another --output"
            ) from error
        try:
            # The system lets go of it when this process ends, whatever its children do.
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            self._lock.close()
            raise UsageError(
                f"another run is writing to {path}; wait for it to end, or choose another --output"
            ) from error
        except OSError as error:  # a file system without locks
            print(
                f"warning: {path} cannot be locked ({error.strerror}); see to it that no other run writes there",
                file=sys.stderr,
            )
        for folder in (path, path / CHECKPOINTS, path / "last", path / "best"):
            remove_unfinished(folder)
        self._writer = Writer()

    def save_settings(self, settings: dict[str, Any]) -> None:
        """Write args.yaml."""
        text = yaml.safe_dump(settings, sort_keys=False)
        write_atomically(self.path / "args.yaml", lambda path: path.write_text(text))

    def save_bad_files(self, names: dict[str, str]) -> None:
        """Add to bad_files.txt: the images that cannot be read, each with the reason."""
        file = self.path / "bad_files.txt"
        before = file.read_text(errors="surrogateescape").splitlines() if file.exists() else []
        every = dict(line.partition("\t")[::2] for line in before) | names
        text = "".join(f"{name}\t{reason}\n" for name, reason in sorted(every.items()))
        write_atomically(file, lambda path: path.write_text(text, errors="surrogateescape"))

    def add_skipped(self, lines: list[str]) -> None:
        """Add to skipped.txt: the images of steps that are left out."""
        file = self.path / "skipped.txt"
        before = file.read_text(errors="surrogateescape") if file.exists() else ""
        text = before + "".join(f"{line}\n" for line in lines)
        write_atomically(file, lambda path: path.write_text(text, errors="surrogateescape"))

    def save_state(self, state: RunState) -> None:
        """Hand a state to the writer, and remove the oldest but `keep`. The state must change no more."""

        def write() -> None:
            new = state.file_in(self.path)
            state.save(new)
            # A later one is of a branch that this run has left, by going on from an older state.
            files = state_files(self.path)
            left = [file for file in files if file > new]
            for file in left + [file for file in files if file <= new][self._keep :]:
                file.unlink(missing_ok=True)

        self._writer.submit(write)

    def save_model(self, name: str, model: VisionTransformer, notes: dict[str, Any]) -> None:
        """Hand a copy of a model's weights to the writer, for the folder `name`."""
        # Reordered here: where a second thread computes, OpenMP's threads of both sleep between operations, and every
        # later step would take a third longer.
        weights = {name: value.contiguous() for name, value in on_host(dict(model.state_dict())).items()}
        self._writer.submit(lambda: save_weights(self.path / name, model.config, weights, **notes))

    def finish(self) -> None:
        """Wait until all is written."""
        self._writer.finish()

    def close(self) -> None:
        """Wait until all is written, and let go of the folder."""
        try:
            self._writer.close()
        finally:
            self._lock.close()


class Writer:
    """Runs jobs one after the other in a thread; at most one waits while another runs.

    Raises:
        FastvitcError: from `submit`, `finish` and `close`, where an earlier job failed. No later one is run.
    """

    def __init__(self) -> None:
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue(maxsize=1)
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="fastvitc writer", daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], None]) -> None:
        """Have a job run; waits while another one does."""
        self._raise()
        self._jobs.put(job)

    def finish(self) -> None:
        """Wait for the jobs so far."""
        self._jobs.join()
        self._raise()

    def close(self) -> None:
        """Wait for the jobs so far and end the thread."""
        if self._thread.is_alive():
            self._jobs.put(None)
            self._thread.join()
        self._raise()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                if self._error is None:
                    job()
            except Exception as error:  # PyTorch's writer raises RuntimeError where the disk is full
                self._error = error
            finally:
                self._jobs.task_done()
        self._jobs.task_done()

    def _raise(self) -> None:
        if self._error is not None:
            reason = str(self._error).splitlines()[0] if str(self._error) else type(self._error).__name__
            raise FastvitcError(
                f"cannot save the run: {reason}. What was saved before is whole; free some space or mend the disk, "
                "then continue with --resume"
            ) from self._error
