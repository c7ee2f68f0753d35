"""A training run: the loop over epochs and steps, and when it saves."""

import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from math import isfinite
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from fastvitc.data import Batch, Loader
from fastvitc.errors import DataError, FastvitcError
from fastvitc.models.stems import pixel_statistics
from fastvitc.training.assembly import Parts
from fastvitc.training.evaluation import NOT_EVALUATED, Accuracy, precise_batch_norm
from fastvitc.training.folder import RunFolder
from fastvitc.training.health import NotFinite, Watch
from fastvitc.training.interrupts import Interrupts
from fastvitc.training.log import RunLog
from fastvitc.training.meter import Meter
from fastvitc.training.optim import set_rates
from fastvitc.training.process import Poll
from fastvitc.training.report import EpochRow
from fastvitc.training.state import RunState, newest_state, on_host
from fastvitc.tuning.machine import versions

#: What a process may ask of all; the largest request wins.
_NOTHING, _SAVE, _STOP = range(3)
#: Keeps the draws of erasing apart from those of mixing.
_ERASING = 1


class Run:
    """Trains what `assemble` put together, from the state where there is one.

    Args:
        parts: of the run.
        state: where to go on. A state of other images or another loader counts to the start of its epoch.
        folder: where the run is saved; None on all processes but the main one.
    """

    def __init__(self, parts: Parts, state: RunState | None, folder: RunFolder | None) -> None:
        self.parts, self.folder = parts, folder
        self.epoch = self.step = 0
        self.best, self._rows, self._resumed = -1.0, [], state is not None
        self._meter, self._watch = Meter(parts.images_per_step, parts.process), Watch()
        self._skipped: set[int] = set()  # steps, counted from the run's begin
        self._rollbacks = 0
        if state is not None:
            self._take(state)
            if state.data == parts.data:
                self._skipped, self._rollbacks = set(state.skipped), state.rollbacks
        self._poll, self._interrupts = Poll(parts.process), Interrupts()
        self._stepped = False
        self._saved_at, self._unsaved = time.monotonic(), 0

    def train(self) -> float:
        """Run all epochs; return the best validation top-1 in percent.

        Raises:
            Interrupted: the run was asked to stop; its state is saved.
            FastvitcError: the run diverged, or it cannot be saved.
        """
        parts = self.parts
        log = RunLog(parts, self.folder, self._rows, self.epoch, self.step, self._resumed)
        try:
            with self._interrupts:
                if not self._resumed:
                    self._save()  # what the run can go back to
                while self.epoch < parts.settings.optimisation.epochs:
                    try:
                        self._epoch(log)
                    except NotFinite as trouble:
                        self._go_back(trouble, log)
                self._poll.last()
                if self.folder is not None:
                    self.folder.finish()
            log.end(self._rows)
        except DataError:
            if self.folder is not None:  # of this process; the others may not come to tell theirs
                self.folder.save_bad_files(self._own_bad_files())
            raise
        except FastvitcError:
            raise
        except Exception as error:
            if not self._interrupts.received:
                raise
            # The signal also went to what this process waits for: a compiler, a worker.
            where = (
                "what was saved before stays"
                if self.folder is None
                else f"--resume {self.folder.path} goes on"
            )
            raise self._interrupts.error(f"a step was not finished ({error}); {where}") from error
        finally:
            parts.close()
            log.close()
        return self.best

    def _epoch(self, log: RunLog) -> None:
        parts, start = self.parts, time.perf_counter()
        self._train_epoch(log)
        train_loss = self._check_finite()
        images_per_second, data_wait = self._meter.rates()
        mfu = log.mfu(images_per_second)
        accuracy = self._evaluate() if self._validates() else NOT_EVALUATED
        row = EpochRow(
            epoch=self.epoch + 1,
            train_loss=train_loss,
            val_loss=accuracy.loss,
            val_top1=accuracy.top1,
            val_top5=accuracy.top5,
            lr=self._rate(),
            images_per_second=images_per_second,
            data_wait=data_wait,
            mfu=mfu,
            seconds=time.perf_counter() - start,
        )
        if not self._skipped.intersection(range(self._done - parts.steps, self._done)):
            self._rollbacks = 0
        self._rows.append(row)
        is_best = accuracy.top1 > self.best  # nan is not
        self.best = accuracy.top1 if is_best else self.best
        self.epoch, self.step = self.epoch + 1, 0
        self._meter = Meter(parts.images_per_step, parts.process)
        self._save_models(row, is_best)
        self._save()
        self._tell_bad_files(log)
        log.end_epoch(row, accuracy)

    def _train_epoch(self, log: RunLog) -> None:
        """The steps of an epoch that are left."""
        parts, log_every = self.parts, self.parts.settings.run.log_every
        accumulate = parts.settings.optimisation.grad_accum_steps
        parts.begin_epoch(self.epoch)
        parts.train_loader.seek(self.epoch, self.step * accumulate)
        log.start_epoch(self.epoch, self.step)
        batches = iter(parts.train_loader)
        while self.step < parts.steps:
            done = self._done
            self._seed(done)
            with self._meter.waiting():
                group = [
                    (self._erased(images, done * accumulate + i), labels, self._mix(done * accumulate + i))
                    for i, (images, labels) in enumerate(islice(batches, accumulate))
                ]
            set_rates(parts.optimizers, parts.schedule.at(done / parts.steps))
            if done in self._skipped:
                self.step += 1
                continue
            loss = parts.step(group)
            self._meter.add(loss)
            self._watch.add(done, loss)
            if parts.ema is not None:
                parts.ema.update(done)
            first, self._stepped, self.step = not self._stepped, True, self.step + 1
            if first:
                parts.compilation.remember()
            log.step(self._meter.restart() if first else None)
            if not first and self.step % log_every == 0 and self.step < parts.steps:
                mean = self._meter.mean_loss()
                if not isfinite(mean):
                    self._check_finite()
                log.point(self.epoch, self.step, mean, self._rate(), self._meter.rates())
            self._answer(log)

    def _answer(self, log: RunLog) -> None:
        """Save, or save and stop, where a process asks for it."""
        run = self.parts.settings.run
        self._unsaved += 1
        due = time.monotonic() - self._saved_at >= 60 * run.save_minutes
        due = due or (run.save_every is not None and self._unsaved >= run.save_every)
        request = _STOP if self._interrupts.received else _SAVE if due else _NOTHING
        answer = self._poll(request)
        late = self._unsaved < 2 and self.parts.process.world_size > 1  # asked before the save of a step ago
        if answer == _NOTHING or (answer == _SAVE and late):
            return
        self._check_finite()
        self._save()
        if answer == _STOP:
            self._tell_bad_files(log)
            self._stop()

    def _validates(self) -> bool:
        settings = self.parts.settings
        epoch = self.epoch + 1
        return epoch % settings.run.val_interval == 0 or epoch == settings.optimisation.epochs

    def _evaluate(self) -> Accuracy:
        parts, o = self.parts, self.parts.settings.optimisation
        before = self._state()  # what follows changes running statistics
        parts.model.image_size = parts.curriculum.size
        if o.precise_bn:
            count = max(1, o.precise_bn // (o.batch_size * parts.process.world_size))
            parts.train_loader.resize(parts.curriculum.size)
            parts.train_loader.seek(self.epoch)
            precise_batch_norm(parts.evaluated, islice(parts.train_loader, count), dtype=parts.dtype)
        for model in dict.fromkeys((parts.model, parts.evaluated)):  # in the same order on every process
            parts.process.average_statistics(model)
        try:
            return parts.evaluate(self._watched(parts.val_loader))
        except _Stopped:
            if self.folder is not None:
                self.folder.save_state(before)
            self._stop()

    def _watched(self, loader: Loader) -> Iterator[Batch]:
        """The loader's batches, until a process asks to stop."""
        config = loader.config
        common = len(config.index) // (config.batch_size * config.world_size)  # as many on every process
        for number, batch in enumerate(loader):
            if number < common and self._poll(_STOP if self._interrupts.received else _NOTHING) == _STOP:
                raise _Stopped
            yield batch

    def _stop(self) -> NoReturn:
        where = f"epoch {self.epoch + 1}, step {self.step}"
        if self.folder is not None:
            self.folder.finish()
            where += f" is saved; continue with --resume {self.folder.path}"
        self.parts.process.gather(None)  # a launcher ends the others soon after the first that leaves
        raise self._interrupts.error(where)

    def _tell_bad_files(self, log: RunLog) -> None:
        """Tell of the images that cannot be read, of all processes."""
        gathered = self.parts.process.gather(self._own_bad_files())
        log.bad_files({name: why for bad in gathered for name, why in bad.items()})

    def _own_bad_files(self) -> dict[str, str]:
        loaders = self.parts.train_loader, self.parts.val_loader
        return {loader.config.index.name(n): why for loader in loaders for n, why in loader.bad.items()}

    def _seed(self, step: int) -> None:
        """One random stream per step and process: it does not depend on where the run was resumed."""
        parts = self.parts
        stream = np.random.SeedSequence((parts.settings.machine.seed, step, parts.process.rank))
        torch.manual_seed(int(stream.generate_state(1)[0]))

    def _mix(self, batch: int) -> Tensor | None:
        parts = self.parts
        if not parts.mixing.enabled:
            return None
        off, size = parts.settings.optimisation.mixup_off_epoch, parts.model.image_size
        if off and self.epoch >= off:
            return parts.mixing.none(size).to(parts.process.device)
        seed = parts.settings.machine.seed, parts.process.rank, batch
        mix = parts.mixing.sample(size, seed)
        return mix.to(parts.process.device, non_blocking=True)

    def _erased(self, images: Tensor, batch: int) -> Tensor:
        parts = self.parts
        return parts.erasing(images, (parts.settings.machine.seed, parts.process.rank, batch, _ERASING))

    def _rate(self) -> float:
        return max(group["lr"] for optimizer in self.parts.optimizers for group in optimizer.param_groups)

    @property
    def _done(self) -> int:
        """Steps that are done, or left out, since the run's begin."""
        return self.epoch * self.parts.steps + self.step

    def _check_finite(self) -> float:
        """The mean loss of the epoch so far; NotFinite on every process where something is not finite."""
        self._watch.check(self.parts.model, self._done, self.parts.process)
        return self._meter.mean_loss()

    def _go_back(self, trouble: NotFinite, log: RunLog) -> None:
        """To the last state that was saved; from there on the steps that made the trouble are left out."""
        parts, most = self.parts, self.parts.settings.run.max_rollbacks
        where = f"{trouble.what}, found after epoch {self.epoch + 1}, step {self.step}"
        if self._rollbacks == most:
            raise FastvitcError(
                f"{where}; the run went back {most} times before (--max-rollbacks). The last state that was saved "
                "is from before this. Lower --lr, lengthen --warmup-epochs or set --clip-grad"
            )
        self._rollbacks += 1
        window = trouble.window(2**self._rollbacks)
        self._skipped.update(window)
        self._note_skipped(window)
        if self.folder is not None:
            self.folder.finish()
        path = parts.process.share(None if self.folder is None else str(self.folder.path))
        _, state = newest_state(Path(path))
        self._take(state)
        self._watch = Watch()
        self._saved_at, self._unsaved = time.monotonic(), 0
        log.went_back(where, self.epoch, self.step, len(window))

    def _take(self, state: RunState) -> None:
        """Go on from a state."""
        parts = self.parts
        parts.restore(state)
        self.epoch, self.step, self.best = state.epoch, 0, state.best
        self._rows = [EpochRow(**row) for row in state.rows]
        self._meter = Meter(parts.images_per_step, parts.process)
        if state.data == parts.data:  # else the epoch's order is another one
            self.step = state.step
            self._meter.restore(state.processes[parts.process.rank]["meter"])

    def _note_skipped(self, steps: range) -> None:
        """Write down the images of steps that are left out, of all processes."""
        parts, accumulate = self.parts, self.parts.settings.optimisation.grad_accum_steps
        loader, lines = parts.train_loader, []
        for done in steps:
            epoch, step = divmod(done, parts.steps)
            if step == 0 and epoch == parts.settings.optimisation.epochs:
                continue  # the last update of the run: no step follows it
            for samples in islice(loader.order.epoch(epoch, step * accumulate), accumulate):
                names = map(loader.config.index.name, samples.numbers.tolist())
                lines += [f"epoch {epoch + 1} step {step + 1}\t{name}" for name in names]
        gathered = parts.process.gather(lines)
        if self.folder is not None:
            self.folder.add_skipped([line for lines in gathered for line in lines])

    def _save_models(self, row: EpochRow, is_best: bool) -> None:
        parts = self.parts
        if self.folder is None:
            return
        config = parts.model.config
        mean, std = pixel_statistics(config.in_chans, config.mean, config.std)
        notes = {
            "name": parts.settings.model.model,
            "classes": list(parts.classes),
            "preprocessing": {
                "mean": mean,
                "std": std,
                "crop_ratio": parts.settings.data.crop_ratio,
                "interpolation": parts.settings.data.interpolation,
            },
            "backends": parts.backends,
            "epoch": row.epoch,
            "val_top1": row.val_top1,
            "versions": versions(),
        }
        for name in ("last", "best") if is_best else ("last",):
            self.folder.save_model(name, parts.evaluated, notes)

    def _save(self) -> None:
        state = self._state()
        if self.folder is not None:
            self.folder.save_state(state)
        self._saved_at, self._unsaved = time.monotonic(), 0

    def _state(self) -> RunState:
        """The state of the run between two steps, in host memory; every process asks for it at once."""
        parts = self.parts
        own = on_host({**parts.own_state(), "meter": self._meter.state()})
        return RunState(
            epoch=self.epoch,
            step=self.step,
            best=self.best,
            rows=[asdict(row) for row in self._rows],
            model=on_host(dict(parts.model.state_dict())) if self.folder else {},
            ema=on_host(dict(parts.ema.model.state_dict())) if self.folder and parts.ema else None,
            optimizers=on_host([o.state_dict() for o in parts.optimizers]) if self.folder else [],
            processes=parts.process.gather(own),
            settings=parts.settings.to_dict(),
            classes=list(parts.classes),
            backends=parts.backends,
            data=parts.data,
            lengths=[[0.0, parts.schedule.epochs], *map(list, parts.schedule.changes)],
            skipped=sorted(self._skipped),
            rollbacks=self._rollbacks,
        )


class _Stopped(Exception):
    """A process asks to stop, in an evaluation."""
