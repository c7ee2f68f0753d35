"""A training run: the loop over epochs, and what it saves and tells."""

import math
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastvitc.errors import FastvitcError
from fastvitc.models.saved import save_model
from fastvitc.models.stems import IMAGENET_MEAN, IMAGENET_STD
from fastvitc.training.assembly import Parts
from fastvitc.training.evaluation import Accuracy, precise_batch_norm
from fastvitc.training.meter import Meter
from fastvitc.training.optim import set_rates
from fastvitc.training.report import EpochRow, Reporter
from fastvitc.training.state import STATE, RunState
from fastvitc.training.step import compiled_graphs
from fastvitc.training.words import Yardstick, duration, introduction, yardstick
from fastvitc.tuning.machine import versions

_ON_DIVERGENCE = (
    "what was saved is that of the epochs before. Lower --lr, lengthen --warmup-epochs or set --clip-grad"
)


class Run:
    """Trains what `assemble` put together, from the state where there is one; nothing is written before `train`."""

    def __init__(self, parts: Parts, state: RunState | None = None) -> None:
        self.parts = parts
        self.first_epoch, self.best = (0, -1.0) if state is None else (state.epoch, state.best)
        self._graphs = 0
        self._yardstick: Yardstick | None = None
        self._forecast_told = False

    def train(self, folder: Path | None) -> float:
        """Run all epochs; return the best validation top-1 in percent. The process with a folder reports and saves."""
        parts, reporter = self.parts, None
        if folder is not None:
            done = self.first_epoch
            reporter = Reporter(folder, resumed_epochs=done, resumed_steps=done * parts.steps)
            # On the main process alone: several at once would share the cores that they measure.
            self._yardstick = yardstick(parts)
            for line in introduction(parts, self._yardstick, folder):
                reporter.line(line)
        try:
            for epoch in range(self.first_epoch, parts.settings.optimisation.epochs):
                self._epoch(epoch, folder, reporter)
        finally:
            parts.close()
            if reporter is not None:
                reporter.close()
        if reporter is not None and folder is not None:
            reporter.line(f"best validation top-1: {self.best:.2f}%; curves: {folder / 'curves.png'}")
        return self.best

    def _epoch(self, epoch: int, folder: Path | None, reporter: Reporter | None) -> None:
        parts, start = self.parts, time.perf_counter()
        o, process = parts.settings.optimisation, parts.process
        train_loss, images_per_second, data_wait = self._train_epoch(epoch, reporter)
        self._check_weights(epoch)
        if o.precise_bn:
            count = max(1, o.precise_bn // (o.batch_size * process.world_size))
            parts.train_loader.seek(epoch)
            precise_batch_norm(parts.evaluated, islice(parts.train_loader, count), dtype=parts.dtype)
        for model in dict.fromkeys((parts.model, parts.evaluated)):  # in the same order on every process
            process.average_statistics(model)
        accuracy = parts.evaluate(parts.val_loader)
        is_best = accuracy.top1 > self.best
        self.best = max(self.best, accuracy.top1)
        if reporter is None or folder is None:
            return
        self._save(epoch, folder, accuracy, is_best)
        row = EpochRow(
            epoch=epoch + 1,
            train_loss=train_loss,
            val_loss=accuracy.loss,
            val_top1=accuracy.top1,
            val_top5=accuracy.top5,
            lr=parts.optimizers[0].param_groups[0]["lr"],
            images_per_second=images_per_second,
            data_wait=data_wait,
            mfu=self._mfu(images_per_second),
            seconds=time.perf_counter() - start,
        )
        reporter.end_epoch(
            row,
            (epoch + 1) * parts.steps,
            f"epoch {row.epoch}/{o.epochs}: loss {row.train_loss:.4f}, validation loss {row.val_loss:.4f}, "
            f"top-1 {row.val_top1:.2f}%, top-5 {row.val_top5:.2f}% of {accuracy.images}, "
            f"{row.images_per_second:,.0f} images/s, data wait {row.data_wait:.0%}, MFU {row.mfu:.1%}, "
            f"{row.seconds:.1f} s",
        )
        self._forecast(row.seconds, reporter)
        graphs = compiled_graphs()
        if epoch > self.first_epoch and graphs > self._graphs:
            reporter.line(f"warning: {graphs - self._graphs} graphs were compiled anew in epoch {row.epoch}")
        self._graphs = graphs

    def _train_epoch(self, epoch: int, reporter: Reporter | None) -> tuple[float, float, float]:
        """(mean loss, images per second, share of time spent waiting for data) of one epoch."""
        parts, log_every = self.parts, self.parts.settings.run.log_every
        accumulate = parts.settings.optimisation.grad_accum_steps
        meter = Meter(parts.images_per_step, parts.process)
        parts.train_loader.seek(epoch)
        if reporter is not None:
            reporter.start_epoch(epoch + 1, parts.settings.optimisation.epochs, parts.steps)
        batches = iter(parts.train_loader)
        for step in range(parts.steps):
            done = epoch * parts.steps + step
            self._seed(done)
            with meter.waiting():
                group = [
                    (images, labels, self._mix(done * accumulate + i))
                    for i, (images, labels) in enumerate(islice(batches, accumulate))
                ]
            set_rates(parts.optimizers, parts.schedule.at(done / parts.steps))
            meter.add(parts.step(group))
            if parts.ema is not None:
                parts.ema.update(done)
            if reporter is not None:
                reporter.step()
            if done == self.first_epoch * parts.steps:
                seconds = meter.restart()
                if reporter is not None:
                    reporter.line(f"first step, compilation included: {seconds:.1f} s")
            elif (step + 1) % log_every == 0 and step + 1 < parts.steps:
                loss = self._finite(meter.mean_loss(), epoch)
                if reporter is not None:
                    self._log_point(done, loss, meter, reporter)
        return self._finite(meter.mean_loss(), epoch), *meter.rates()

    def _log_point(self, done: int, loss: float, meter: Meter, reporter: Reporter) -> None:
        """What is told within an epoch, after optimiser step number `done`."""
        parts = self.parts
        rate, wait = meter.rates()
        lr = parts.optimizers[0].param_groups[0]["lr"]
        text = (
            f"  step {done % parts.steps + 1}/{parts.steps}: loss {loss:.4f}, learning rate {lr:.2e}, "
            f"{rate:,.0f} images/s, data wait {wait:.0%}, MFU {self._mfu(rate):.1%}"
        )
        reporter.point(done + 1, text, loss=loss, lr=lr, images_per_second=rate)
        self._forecast(parts.steps * parts.images_per_step / rate, reporter)

    def _forecast(self, seconds: float, reporter: Reporter) -> None:
        """Say once, as soon as it is known, how long an epoch takes here and what that makes of the run."""
        epochs = self.parts.settings.optimisation.epochs - self.first_epoch
        if not self._forecast_told and epochs > 1:
            one, all_of_them = duration(seconds), duration(epochs * seconds)
            reporter.line(f"an epoch takes about {one} on this machine, {epochs} epochs {all_of_them}")
        self._forecast_told = True

    def _seed(self, step: int) -> None:
        """One random stream per step and process: it does not depend on where the run was resumed."""
        parts = self.parts
        stream = np.random.SeedSequence((parts.settings.machine.seed, step, parts.process.rank))
        torch.manual_seed(int(stream.generate_state(1)[0]))

    def _mix(self, batch: int) -> Tensor | None:
        parts = self.parts
        if not parts.mixing.enabled:
            return None
        seed = parts.settings.machine.seed, parts.process.rank, batch
        mix = parts.mixing.draw(parts.model.config.image_size, seed)
        return mix.to(parts.process.device, non_blocking=True)

    def _mfu(self, images_per_second: float) -> float:
        return 0.0 if self._yardstick is None else self._yardstick.share(images_per_second)

    def _finite(self, loss: float, epoch: int) -> float:
        if not math.isfinite(loss):
            raise FastvitcError(f"the training loss became {loss} in epoch {epoch + 1}; {_ON_DIVERGENCE}")
        return loss

    def _check_weights(self, epoch: int) -> None:
        """The loss is of the weights before the last update; the update may have spoilt them."""
        for name, tensor in self.parts.model.state_dict().items():
            if not tensor.isfinite().all():
                raise FastvitcError(f"{name} is not finite after epoch {epoch + 1}; {_ON_DIVERGENCE}")

    def _save(self, epoch: int, folder: Path, accuracy: Accuracy, is_best: bool) -> None:
        parts = self.parts
        notes = {
            "name": parts.settings.model.model,
            "classes": list(parts.classes),
            "preprocessing": {
                "mean": IMAGENET_MEAN,
                "std": IMAGENET_STD,
                "crop_ratio": parts.settings.data.crop_ratio,
            },
            "backends": parts.backends,
            "epoch": epoch + 1,
            "val_top1": accuracy.top1,
            "versions": versions(),
        }
        save_model(folder / "last", parts.evaluated, **notes)
        if is_best:
            save_model(folder / "best", parts.evaluated, **notes)
        state = RunState(
            epoch=epoch + 1,
            best=self.best,
            model=parts.model.state_dict(),
            ema=None if parts.ema is None else parts.ema.model.state_dict(),
            optimizers=[optimizer.state_dict() for optimizer in parts.optimizers],
            settings=parts.settings.to_dict(),
            classes=list(parts.classes),
            world_size=parts.process.world_size,
            backends=parts.backends,
        )
        state.save(folder / "last" / STATE)
